// From decoded pixels to the model's input: colours, resize, crop at the centre, normalisation. The same numbers as
// `quartermap_deploy.data.images.prepare` makes of the same pixels.

import { heightFirst, resizePixels } from "./resize.js";

export const MOST_PIXELS = 50_000_000;

const CHANNELS = { rgb: 3, bgr: 3, grey: 1, rgba: 4 };

// Python's rounding of half a number: to the even side.
function half(number) {
  const below = Math.floor(number / 2);
  return number % 2 === 0 || below % 2 === 0 ? below : below + 1;
}

function resizedSize([height, width], [targetHeight, targetWidth], fit) {
  if (fit === "stretch") return [targetHeight, targetWidth];
  if (targetHeight * width >= targetWidth * height) {
    return [targetHeight, Math.max(targetWidth, Math.floor((targetHeight * width) / height))];
  }
  return [Math.max(targetHeight, Math.floor((targetWidth * height) / width)), targetWidth];
}

export function checkSize(height, width, what) {
  if (height * width > MOST_PIXELS) {
    throw new Error(
      `${what} ${width} × ${height} pixels; at most ${MOST_PIXELS.toLocaleString("en")} are taken`,
    );
  }
}

// RGBA → the channels that a model takes, in the order of an image; BT.601 for greys, as Pillow computes it.
function colours(rgba, channels) {
  if (channels === 4) return rgba;
  const count = rgba.length / 4;
  const found = new Uint8ClampedArray(count * channels);
  for (let i = 0, from = 0, to = 0; i < count; i++, from += 4) {
    const [red, green, blue] = [rgba[from], rgba[from + 1], rgba[from + 2]];
    if (channels === 1) {
      found[to++] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
    } else {
      found[to++] = red;
      found[to++] = green;
      found[to++] = blue;
    }
  }
  return found;
}

function cropped(values, channels, [height, width], [cropHeight, cropWidth]) {
  const [top, left] = [half(height - cropHeight), half(width - cropWidth)];
  const row = cropWidth * channels;
  const found = new Uint8ClampedArray(cropHeight * row);
  for (let y = 0; y < cropHeight; y++) {
    const from = ((top + y) * width + left) * channels;
    found.set(values.subarray(from, from + row), y * row);
  }
  return found;
}

// What each of the 256 values of a pixel becomes in a channel: every step in single precision, as NumPy takes them.
function levels(mean, std, scale) {
  const found = new Float32Array(256);
  const [m, s] = [Math.fround(mean), Math.fround(std)];
  for (let value = 0; value < 256; value++) found[value] = Math.fround(Math.fround(value * scale) - m) / s;
  return found;
}

// image: {height, width, rgba}. Returns the input, (1, channels, height, width) of float32, and the pixels that the
// model sees, (height, width, channels) of 8 bits in the order of an image.
export function prepare(image, { resize, fit, crop, interpolation, mean, std, color, scale, pillow }) {
  const channels = CHANNELS[color];
  const size = [image.height, image.width];
  const resized = resizedSize(size, resize, fit);
  const between = heightFirst(size, resized, pillow) ? [resized[0], image.width] : [image.height, resized[1]];
  checkSize(...between, "the resize would make");
  checkSize(...resized, "the resize would make");
  const pixels = resizePixels(colours(image.rgba, channels), channels, size, resized, interpolation, pillow);
  const seen = cropped(pixels, channels, resized, crop);
  const count = crop[0] * crop[1];
  const input = new Float32Array(channels * count);
  for (let channel = 0; channel < channels; channel++) {
    const values = levels(mean[channel], std[channel], scale);
    const from = color === "bgr" ? 2 - channel : channel;
    for (let i = 0; i < count; i++) input[channel * count + i] = values[seen[i * channels + from]];
  }
  return {
    input,
    shape: [1, channels, ...crop],
    seen: { height: crop[0], width: crop[1], channels, values: seen },
  };
}
