// The model, in a thread of its own so that the page never stands still. It starts by itself, and is then given
// {kind: "file", id, bytes} or {kind: "pixels", id, height, width, rgba} for each image.

import * as ort from "./onnxruntime.mjs";
import { answer } from "./answer.js";
import { decode } from "./decode.js";
import { prepare } from "./prepare.js";

const MOST_THREADS = 8;

let facts = null;
let session = null;

// Fetch a file and tell how much of it has come. What is not what the site was written with is refused.
async function fetched(address, { bytes, sha256 }, what) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${what} cannot be fetched: ${response.status} ${response.statusText}`);
  const data = new Uint8Array(bytes);
  const reader = response.body.getReader();
  let have = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (have + value.length > bytes)
      throw new Error(`${what} is larger than the ${bytes} bytes that the site was written with`);
    data.set(value, have);
    have += value.length;
    postMessage({ kind: "progress", what, have, bytes });
  }
  if (have < bytes) throw new Error(`${what} ends after ${have} of ${bytes} bytes; load the page again`);
  // Browsers have no hash for pages that came by plain HTTP from another machine.
  if (globalThis.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
    const found = Array.from(digest, byte => byte.toString(16).padStart(2, "0")).join("");
    if (found !== sha256) throw new Error(`${what} is another one than the site was written with`);
  }
  return data;
}

async function run(input, shape) {
  const feeds = { [facts.input]: new ort.Tensor("float32", input, shape) };
  const start = performance.now();
  const outputs = await session.run(feeds);
  return { outputs, milliseconds: performance.now() - start };
}

// The largest difference as a share of the largest expected value, worst of the outputs; infinite for NaN.
function worst(outputs, expected) {
  let found = 0;
  for (const [name, wanted] of Object.entries(expected)) {
    const values = outputs[name].data;
    let [difference, largest] = [values.length === wanted.length ? 0 : Infinity, 0];
    for (let i = 0; i < wanted.length; i++) {
      const error = Math.abs(Number(values[i]) - wanted[i]);
      if (!(error <= difference)) difference = Number.isNaN(error) ? Infinity : error;
      largest = Math.max(largest, Math.abs(wanted[i]));
    }
    found = Math.max(found, largest > 0 ? difference / largest : difference);
  }
  return found;
}

// Run the bundle's golden input, which warms up too, and compare with what PyTorch computed for it.
async function check() {
  const { input, outputs } = facts.golden;
  const data = await fetched(
    new URL("./golden.bin", import.meta.url),
    facts.files.golden,
    "the golden values",
  );
  const numbers = new Float32Array(data.buffer);
  const size = input.reduce((a, b) => a * b, 1);
  const expected = {};
  let at = size;
  for (const [name, shape] of Object.entries(outputs)) {
    const count = shape.reduce((a, b) => a * b, 1);
    expected[name] = numbers.subarray(at, at + count);
    at += count;
  }
  const made = await run(numbers.subarray(0, size), input);
  const compared = Object.keys(expected).length > 0;
  return { error: compared ? worst(made.outputs, expected) : null, milliseconds: made.milliseconds };
}

async function start() {
  facts = await (await fetch(new URL("./facts.json", import.meta.url))).json();
  const wasm = await fetched(
    new URL("./onnxruntime.wasm", import.meta.url),
    facts.files.runtime,
    "ONNX Runtime",
  );
  const model = await fetched(new URL("./model.onnx", import.meta.url), facts.files.model, "the model");
  postMessage({ kind: "progress", what: "the model is being read", have: 1, bytes: 1 });
  // Memory is shared between threads only where the server sends the two headers that isolate the page.
  const threads =
    self.crossOriginIsolated && facts.threads
      ? Math.min(navigator.hardwareConcurrency || 1, MOST_THREADS)
      : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmBinary = wasm.buffer;
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  postMessage({ kind: "ready", threads, ...(await check()) });
}

async function answered(message) {
  const begin = performance.now();
  const usesAlpha = facts.preprocessing.color === "rgba";
  const image = message.kind === "file" ? await decode(message.bytes, usesAlpha) : { ...message, notes: [] };
  const decoded = performance.now();
  const prepared = prepare(image, facts.preprocessing);
  const ready = performance.now();
  const made = await run(prepared.input, prepared.shape);
  return {
    kind: "answer",
    id: message.id,
    answer: answer(made.outputs, facts),
    seen: prepared.seen,
    size: [image.height, image.width],
    notes: image.notes,
    milliseconds: { decode: decoded - begin, prepare: ready - decoded, run: made.milliseconds },
  };
}

// One after the other: a session answers one at a time.
let last = Promise.resolve();

function queue(id, task) {
  last = last
    .then(task)
    .catch(error => postMessage({ kind: "fault", id, text: String(error.message ?? error) }));
}

onmessage = ({ data }) => queue(data.id, async () => postMessage(await answered(data)));
queue(null, start);
postMessage({ kind: "loaded" });
