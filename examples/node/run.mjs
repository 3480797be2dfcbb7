// Runs a model of a bundle in Node.js: node run.mjs MODEL INPUT
//
// INPUT holds one prepared input as float32 numbers and nothing else. Prints every number of the first output, one on
// each line.

import { readFile } from "node:fs/promises";
import ort from "onnxruntime-node";

const [model, input] = process.argv.slice(2);
if (input === undefined) {
  console.error("usage: node run.mjs MODEL INPUT");
  process.exit(2);
}

const session = await ort.InferenceSession.create(model, { intraOpNumThreads: 1 });
const bytes = await readFile(input);
const numbers = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
// A name in the place of a size means any: here, a batch of one.
const shape = session.inputMetadata[0].shape.map(side => (typeof side === "number" && side > 0 ? side : 1));
const feeds = { [session.inputNames[0]]: new ort.Tensor("float32", numbers, shape) };
const outputs = await session.run(feeds);
for (const value of outputs[session.outputNames[0]].data) console.log(value);
