// PNG files, decoded here and not by the browser: a canvas multiplies colours by their alpha and loses what Pillow
// keeps, converts them by profiles that Pillow passes over, and of 16 bits nobody knows what it makes.

import { checkSize } from "./prepare.js";

const CHANNELS = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 };
const DEPTHS = { 0: [1, 2, 4, 8, 16], 2: [8, 16], 3: [1, 2, 4, 8], 4: [8, 16], 6: [8, 16] };
// First column and row, and the steps between columns and rows, of each pass of an interlaced file.
const PASSES = [
  [0, 0, 8, 8],
  [4, 0, 8, 8],
  [0, 4, 4, 8],
  [2, 0, 4, 4],
  [0, 2, 2, 4],
  [1, 0, 2, 2],
  [0, 1, 1, 2],
];
const WHOLE = [[0, 0, 1, 1]];

function chunksOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const found = { data: [] };
  for (let at = 8; at + 12 <= bytes.length;) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const content = bytes.subarray(at + 8, at + 8 + length);
    if (content.length < length) throw new Error("the file ends too early");
    if (kind === "IDAT") found.data.push(content);
    else if (kind === "IEND") break;
    else if (!(kind in found)) found[kind] = content;
    at += 12 + length;
  }
  return found;
}

function headOf({ IHDR, PLTE }) {
  if (!IHDR || IHDR.length !== 13) throw new Error("the file has no head");
  const view = new DataView(IHDR.buffer, IHDR.byteOffset, 13);
  const head = {
    width: view.getUint32(0),
    height: view.getUint32(4),
    depth: IHDR[8],
    color: IHDR[9],
    interlaced: IHDR[12],
  };
  if (!DEPTHS[head.color]?.includes(head.depth) || head.interlaced > 1 || IHDR[10] || IHDR[11]) {
    throw new Error("the file is of a kind that PNG does not have");
  }
  if (head.width === 0 || head.height === 0) throw new Error("the image is empty");
  if (head.color === 3 && !PLTE) throw new Error("the file has no palette");
  checkSize(head.height, head.width, "the image has");
  return head;
}

// Inflate what the file holds; more than the image needs is passed over, less is an error.
async function inflated(parts, size) {
  const reader = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const found = new Uint8Array(size);
  let have = 0;
  try {
    while (have < size) {
      const { done, value } = await reader.read();
      if (done) break;
      const part = value.subarray(0, size - have);
      found.set(part, have);
      have += part.length;
    }
  } catch {
    throw new Error("its pixels are damaged");
  }
  reader.cancel().catch(() => {});
  if (have < size) throw new Error("the file ends too early");
  return found;
}

// Take back the filter of every line: a line is what it differs from, to the left, above, or between the two.
function unfilter(data, at, rows, length, step) {
  for (let row = 0; row < rows; row++) {
    const kind = data[at];
    const line = at + 1;
    const above = row === 0 ? -1 : line - length - 1;
    if (kind > 4) throw new Error("its pixels are damaged");
    for (let i = 0; kind && i < length; i++) {
      const left = i < step ? 0 : data[line + i - step];
      const up = above < 0 ? 0 : data[above + i];
      const corner = above < 0 || i < step ? 0 : data[above + i - step];
      data[line + i] +=
        kind === 1 ? left : kind === 2 ? up : kind === 3 ? (left + up) >> 1 : nearestOf(left, up, corner);
    }
    at += length + 1;
  }
  return at;
}

function nearestOf(left, up, corner) {
  const toLeft = Math.abs(up - corner);
  const toUp = Math.abs(left - corner);
  const toCorner = Math.abs(left + up - 2 * corner);
  if (toLeft <= toUp && toLeft <= toCorner) return left;
  return toUp <= toCorner ? up : corner;
}

// A sample of a line, in 8 bits: fewer bits are stretched, of 16 the upper 8 are taken. An index stays as it is.
function sampleOf(data, line, index, depth, isIndex) {
  if (depth === 8) return data[line + index];
  if (depth === 16) return data[line + 2 * index];
  const bit = index * depth;
  const value = (data[line + (bit >> 3)] >> (8 - depth - (bit & 7))) & ((1 << depth) - 1);
  return isIndex ? value : (value * 255) / ((1 << depth) - 1);
}

// What writes a pixel into RGBA, by the kind of the file. A transparent colour is one of 8 bits or fewer.
function writer({ color, depth }, { PLTE, tRNS }, rgba) {
  if (color === 3) {
    return (at, [index]) => {
      for (let channel = 0; channel < 3; channel++) rgba[at + channel] = PLTE[3 * index + channel] ?? 0;
      rgba[at + 3] = tRNS?.[index] ?? 255;
    };
  }
  const grey = color === 0 || color === 4;
  const key = !tRNS || depth === 16 || color > 2 ? null : grey ? [tRNS[1]] : [tRNS[1], tRNS[3], tRNS[5]];
  if (key && depth < 8) key[0] = (key[0] * 255) / ((1 << depth) - 1);
  return (at, samples) => {
    for (let channel = 0; channel < 3; channel++) rgba[at + channel] = samples[grey ? 0 : channel];
    const last = color === 4 ? samples[1] : color === 6 ? samples[3] : 255;
    rgba[at + 3] = key?.every((value, channel) => value === samples[channel]) ? 0 : last;
  };
}

// Returns {height, width, rgba, alpha, depth, exif}: straight alpha, and whether any of it is less than 255.
export async function decodePng(bytes) {
  const chunks = chunksOf(bytes);
  const head = headOf(chunks);
  const { width, height, depth, color } = head;
  const channels = CHANNELS[color];
  const parts = (head.interlaced ? PASSES : WHOLE)
    .map(([left, top, across, down]) => {
      const columns = Math.ceil((width - left) / across);
      const rows = Math.ceil((height - top) / down);
      return { left, top, across, down, columns, rows, length: Math.ceil((columns * channels * depth) / 8) };
    })
    .filter(({ columns, rows }) => columns > 0 && rows > 0);
  const data = await inflated(
    chunks.data,
    parts.reduce((sum, part) => sum + part.rows * (part.length + 1), 0),
  );
  const rgba = new Uint8ClampedArray(width * height * 4);
  const write = writer(head, chunks, rgba);
  const samples = new Array(channels);
  let at = 0;
  for (const part of parts) {
    const first = at + 1;
    at = unfilter(data, at, part.rows, part.length, Math.max(1, (channels * depth) >> 3));
    for (let row = 0; row < part.rows; row++) {
      const line = first + row * (part.length + 1);
      const y = part.top + row * part.down;
      for (let column = 0; column < part.columns; column++) {
        for (let channel = 0; channel < channels; channel++) {
          samples[channel] = sampleOf(data, line, column * channels + channel, depth, color === 3);
        }
        write(4 * (y * width + part.left + column * part.across), samples);
      }
    }
  }
  return { height, width, rgba, depth, exif: chunks.eXIf ?? null };
}
