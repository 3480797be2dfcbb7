// A pad to draw on, in white on black or black on white.

const SIDE = 224;
const WIDTH = 18;

export class Pad {
  #canvas;
  #context;
  #dark = true;
  #drawn;

  // canvas: the element. drawn: called with {height, width, rgba} after each stroke.
  constructor(canvas, drawn) {
    this.#canvas = canvas;
    this.#drawn = drawn;
    canvas.width = canvas.height = SIDE;
    this.#context = canvas.getContext("2d", { willReadFrequently: true });
    this.clear();
    let last = null;
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      last = this.#place(event);
      this.#line(last, last);
    });
    canvas.addEventListener("pointermove", event => {
      if (last === null) return;
      const place = this.#place(event);
      this.#line(last, place);
      last = place;
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, () => {
        if (last === null) return;
        last = null;
        this.#tell();
      });
    }
  }

  clear() {
    this.#context.fillStyle = this.#dark ? "#000" : "#fff";
    this.#context.fillRect(0, 0, SIDE, SIDE);
  }

  // Swap the two colours of what is drawn.
  swap() {
    this.#dark = !this.#dark;
    const image = this.#context.getImageData(0, 0, SIDE, SIDE);
    for (let i = 0; i < image.data.length; i++) if (i % 4 < 3) image.data[i] = 255 - image.data[i];
    this.#context.putImageData(image, 0, 0);
  }

  #place(event) {
    const { left, top, width, height } = this.#canvas.getBoundingClientRect();
    return [((event.clientX - left) * SIDE) / width, ((event.clientY - top) * SIDE) / height];
  }

  #line(from, to) {
    const context = this.#context;
    context.strokeStyle = this.#dark ? "#fff" : "#000";
    context.lineWidth = WIDTH;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
  }

  #tell() {
    this.#drawn({ height: SIDE, width: SIDE, rgba: this.#context.getImageData(0, 0, SIDE, SIDE).data });
  }
}
