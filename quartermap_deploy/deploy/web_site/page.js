// The page: what goes in, what comes out, and what is known of the model. The worker does the work.

import { Pad } from "./pad.js";

const SHOWN = 20;

const at = id => document.getElementById(id);

function element(name, attributes = {}, ...content) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...content);
  return made;
}

const short = error => (error === 0 ? "0" : error.toExponential(1));
const milliseconds = value => (value < 10 ? value.toFixed(1) : value.toFixed(0));

function list(target, rows) {
  for (const [term, text] of rows) target.append(element("dt", {}, term), element("dd", {}, text));
}

// Pictures ------------------------------------------------------------------------------------------------------------

function canvasOf(rgba, height, width, label, attributes = {}) {
  const made = element("canvas", { role: "img", "aria-label": label, ...attributes });
  [made.height, made.width] = [height, width];
  made.getContext("2d").putImageData(new ImageData(rgba, width, height), 0, 0);
  return made;
}

function rgbaOf({ values, channels }) {
  if (channels === 4) return values;
  const count = values.length / channels;
  const found = new Uint8ClampedArray(4 * count).fill(255);
  for (let i = 0; i < count; i++) {
    for (let channel = 0; channel < 3; channel++)
      found[4 * i + channel] = values[i * channels + (channels === 1 ? 0 : channel)];
  }
  return found;
}

function maskPicture({ values, height, width }, palette) {
  const found = new Uint8ClampedArray(4 * values.length).fill(255);
  values.forEach((value, place) => found.set(palette[value % palette.length], 4 * place));
  return canvasOf(found, height, width, "the class of every pixel", { class: "output" });
}

// Answers -------------------------------------------------------------------------------------------------------------

function bar(label, share, ...before) {
  const percent = `${(100 * share).toFixed(1)} %`;
  const meter = element("meter", { max: 1, value: share, "aria-label": label });
  return element(
    "div",
    { class: "bar" },
    element("span", { title: label }, ...before, label),
    meter,
    element("span", { class: "number" }, percent),
  );
}

const shown = {
  classes: ({ scores }) => [
    element("div", { class: "bars" }, ...scores.map(score => bar(score.label, score.probability))),
  ],
  mask: (answer, { palette }) => {
    const rows = answer.shares.slice(0, SHOWN).map(({ index, label, share }) => {
      const key = element("canvas", { class: "key", width: 1, height: 1 });
      const context = key.getContext("2d");
      context.fillStyle = `rgb(${palette[index % palette.length].join(" ")})`;
      context.fillRect(0, 0, 1, 1);
      return bar(label, share, key, " ");
    });
    return [maskPicture(answer, palette), element("div", { class: "bars" }, ...rows)];
  },
  image: ({ rgba, height, width }) => [
    canvasOf(rgba, height, width, "what the model returned", { class: "output" }),
  ],
  tensors: ({ rows }) => {
    const cells = (kind, texts) => element("tr", {}, ...texts.map(text => element(kind, {}, text)));
    const body = rows.map(({ name, type, shape, least, most, mean }) =>
      cells("td", [
        name,
        `(${shape.join(", ")}) ${type}`,
        ...[least, most, mean].map(value => value.toPrecision(4)),
      ]),
    );
    return [
      element(
        "div",
        { class: "scroll" },
        element("table", {}, cells("th", ["output", "shape", "least", "most", "mean"]), ...body),
      ),
    ];
  },
};

function timesText({ size, seen, milliseconds: spent }) {
  return (
    `${size[1]} × ${size[0]} pixels, the model sees ${seen.width} × ${seen.height}; ` +
    `decoded in ${milliseconds(spent.decode)} ms, prepared in ${milliseconds(spent.prepare)} ms, run in ${milliseconds(spent.run)} ms`
  );
}

class Page {
  constructor(facts, worker) {
    this.facts = facts;
    this.worker = worker;
    this.waiting = new Map();
    this.given = 0;
    // What is sent to a worker whose modules are still being loaded is lost.
    this.listening = new Promise(resolve => {
      this.loaded = resolve;
    });
    worker.onmessage = ({ data }) => this[data.kind](data);
    worker.onerror = event => this.stop(event.message || "the worker cannot be started");
  }

  // What the worker says ----------------------------------------------------------------------------------------------

  progress({ what, have, bytes }) {
    at("status").textContent =
      bytes > 1
        ? `Fetching ${what}: ${(have / 1e6).toFixed(1)} of ${(bytes / 1e6).toFixed(1)} MB`
        : `Please wait: ${what}`;
    [at("progress").hidden, at("progress").value] = [bytes <= 1, have / bytes];
  }

  ready({ threads, error, milliseconds: first }) {
    const { tolerance } = this.facts.stored;
    at("progress").hidden = true;
    at("status").textContent = `Ready, on ${threads} ${threads === 1 ? "thread" : "threads"}.`;
    document.body.dataset.phase = "ready";
    if (error === null) {
      at("here").textContent =
        `In this browser the golden input took ${milliseconds(first)} ms. ` +
        "Its outputs are too large to lie beside the page.";
      return;
    }
    const passed = error <= tolerance;
    at("here").className = passed ? "good" : "bad";
    at("here").textContent =
      `In this browser, just now: the bundle's golden input gives what PyTorch computes, ` +
      `to ${short(error)} of the largest value. ` +
      `${passed ? "That is within" : "That is NOT within"} the tolerance of ${short(tolerance)}.`;
    at("here").dataset.error = error;
  }

  answer(message) {
    const place = this.waiting.get(message.id);
    this.waiting.delete(message.id);
    const { seen, notes } = message;
    const picture = canvasOf(rgbaOf(seen), seen.height, seen.width, "what the model sees");
    place.result.prepend(picture);
    place.text.replaceChildren(
      element("b", { class: "name" }, place.name),
      ...shown[message.answer.kind](message.answer, this.facts),
      element("p", { class: "soft small" }, timesText(message)),
      ...notes.map(note => element("p", { class: "small note" }, note)),
    );
    place.result.dataset.done = "yes";
  }

  fault({ id, text }) {
    if (id === null) {
      this.stop(text);
      return;
    }
    const place = this.waiting.get(id);
    this.waiting.delete(id);
    place.text.replaceChildren(
      element("b", { class: "name" }, place.name),
      element("p", { class: "bad" }, text),
    );
    place.result.dataset.done = "no";
  }

  stop(text) {
    at("progress").hidden = true;
    at("status").className = "bad";
    at("status").textContent = `The model cannot be started: ${text}`;
    document.body.dataset.phase = "stopped";
  }

  // What the visitor gives --------------------------------------------------------------------------------------------

  ask(name, message, transfer) {
    const id = ++this.given;
    const text = element(
      "div",
      {},
      element("b", { class: "name" }, name),
      element("p", { class: "soft" }, "…"),
    );
    const result = element("div", { class: "result" }, text);
    at("results").prepend(result);
    while (at("results").children.length > SHOWN) at("results").lastChild.remove();
    this.waiting.set(id, { name, text, result });
    this.listening.then(() => this.worker.postMessage({ ...message, id }, transfer));
  }

  async take(files) {
    for (const file of files) {
      const bytes = new Uint8Array(await file.arrayBuffer());
      this.ask(file.name, { kind: "file", bytes }, [bytes.buffer]);
    }
  }

  listen() {
    const drop = at("drop");
    at("file").addEventListener("change", event => {
      this.take([...event.target.files]);
      event.target.value = "";
    });
    for (const name of ["dragover", "dragleave", "drop"]) {
      // Beside the box too: a browser would leave the page for the image otherwise.
      document.addEventListener(name, event => {
        event.preventDefault();
        drop.classList.toggle("over", name === "dragover");
        if (name === "drop") this.take([...event.dataTransfer.files]);
      });
    }
    document.addEventListener("paste", event => this.take([...event.clipboardData.files]));
    const pad = new Pad(at("pad"), image => this.ask("drawing", { kind: "pixels", ...image }, []));
    at("clear").addEventListener("click", () => pad.clear());
    at("swap").addEventListener("click", () => pad.swap());
  }
}

const address = new URL("./facts.json", import.meta.url);
const facts = await (await fetch(address)).json();
document.title = `${facts.name} – quartermap`;
at("title").textContent = facts.title;
at("subtitle").textContent = facts.subtitle;
list(at("parity"), facts.parity);
list(at("facts"), facts.provenance);
// A plain worker that loads a module: from a page that was opened as a file, browsers start no module as a worker.
new Page(facts, new Worker(new URL("./start.js", import.meta.url))).listen();
