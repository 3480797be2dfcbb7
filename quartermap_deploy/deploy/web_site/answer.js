// What a visitor is shown of the outputs, by the bundle's task: the numbers of `quartermap predict`.

import { resizeFloats } from "./resize.js";

const TOP = 5;

function probabilities(values, activation) {
  if (activation === "none") return Array.from(values);
  if (activation === "sigmoid") return Array.from(values, value => 0.5 + 0.5 * Math.tanh(0.5 * value));
  const largest = values.reduce((found, value) => Math.max(found, value), -Infinity);
  const powers = Array.from(values, value => Math.exp(value - largest));
  const sum = powers.reduce((found, value) => found + value, 0);
  return powers.map(value => value / sum);
}

function classes({ data }, { labels, activation }) {
  const found = probabilities(data, activation);
  const order = [...found.keys()].sort((a, b) => found[b] - found[a] || a - b);
  const scores = order
    .slice(0, TOP)
    .map(index => ({ index, label: labels[index] ?? String(index), probability: found[index] }));
  return { kind: "classes", scores };
}

// The most probable class of each pixel of what the model sees; logits of another size are interpolated first.
export function maskOf({ data, dims }, size, activation, pillow) {
  const [count, height, width] = dims.slice(-3);
  const planes = Array.from({ length: count }, (_, index) => {
    const plane = data.subarray(index * height * width, (index + 1) * height * width);
    return height === size[0] && width === size[1]
      ? plane
      : resizeFloats(plane, [height, width], size, pillow);
  });
  const mask = new Uint16Array(size[0] * size[1]);
  if (count === 1) {
    const threshold = activation === "none" ? 0.5 : 0;
    return mask.map((_, place) => (planes[0][place] > threshold ? 1 : 0));
  }
  const best = Float32Array.from(planes[0]);
  for (let index = 1; index < count; index++) {
    const plane = planes[index];
    for (let place = 0; place < best.length; place++) {
      if (plane[place] > best[place]) [best[place], mask[place]] = [plane[place], index];
    }
  }
  return mask;
}

function mask(output, facts) {
  const { crop, pillow } = facts.preprocessing;
  const values = maskOf(output, crop, facts.activation, pillow);
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  const shares = [...counts]
    .sort((a, b) => b[1] - a[1] || a[0] - b[0])
    .map(([index, count]) => ({
      index,
      label: facts.labels[index] ?? String(index),
      share: count / values.length,
    }));
  return { kind: "mask", height: crop[0], width: crop[1], values, shares };
}

// An image that the model returned, where the range of its values is known: RGBA.
function picture({ data, dims }, { preprocessing: { color, scale } }) {
  const [channels, height, width] = dims.slice(-3);
  const count = height * width;
  const rgba = new Uint8ClampedArray(4 * count).fill(255);
  for (let channel = 0; channel < 4; channel++) {
    if (channel === 3 && channels < 4) continue;
    const from = channels === 1 ? 0 : color === "bgr" ? 2 - channel : channel;
    for (let i = 0; i < count; i++) rgba[4 * i + channel] = data[from * count + i] / Math.fround(scale);
  }
  return { kind: "image", height, width, rgba };
}

function tensors(outputs) {
  const rows = Object.entries(outputs).map(([name, { data, dims, type }]) => {
    const values = Array.from(data, Number);
    const [least, most] = [
      values.reduce((a, b) => Math.min(a, b), Infinity),
      values.reduce((a, b) => Math.max(a, b), -Infinity),
    ];
    return { name, type, shape: dims, least, most, mean: values.reduce((a, b) => a + b, 0) / values.length };
  });
  return { kind: "tensors", rows };
}

// outputs: by name, {data, dims, type}. facts: those of facts.json.
export function answer(outputs, facts) {
  const first = outputs[facts.first_output];
  if (facts.shows === "tensors") return tensors(outputs);
  if (!first.data.every(Number.isFinite))
    throw new Error(`the model's output ${facts.first_output} is NaN or infinite`);
  return { classes, mask, image: picture }[facts.shows](first, facts);
}
