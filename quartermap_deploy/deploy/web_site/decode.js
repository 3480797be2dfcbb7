// From the bytes of a file to pixels, with notes about what a visitor should know of them. Files are what their first
// bytes say, whatever they are called.

import { decodePng } from "./png.js";
import { checkSize } from "./prepare.js";

const UPRIGHT = 1;

const starts = (bytes, ...values) => values.every((value, place) => bytes[place] === value);
const text = (bytes, from, length) => String.fromCharCode(...bytes.subarray(from, from + length));

function kindOf(bytes) {
  if (starts(bytes, 0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a)) return "image/png";
  if (starts(bytes, 0xff, 0xd8, 0xff)) return "image/jpeg";
  if (text(bytes, 0, 4) === "RIFF" && text(bytes, 8, 4) === "WEBP") return "image/webp";
  if (text(bytes, 0, 2) === "BM") return "image/bmp";
  return null;
}

// The orientation in a TIFF block of EXIF data, 1 to 8; 1 where there is none.
function orientationOf(block) {
  if (block.length < 8) return UPRIGHT;
  const view = new DataView(block.buffer, block.byteOffset, block.byteLength);
  const little = text(block, 0, 2) === "II";
  const list = view.getUint32(4, little);
  if (list + 2 > block.length) return UPRIGHT;
  const count = view.getUint16(list, little);
  for (let at = list + 2; at + 12 <= Math.min(block.length, list + 2 + 12 * count); at += 12) {
    if (view.getUint16(at, little) === 0x0112) {
      const value = view.getUint16(at + 8, little);
      return value >= 1 && value <= 8 ? value : UPRIGHT;
    }
  }
  return UPRIGHT;
}

// What stands in a JPEG's head: size, components, orientation.
function jpegHead(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const head = { orientation: UPRIGHT };
  for (let at = 2; at + 4 <= bytes.length && bytes[at] === 0xff;) {
    const marker = bytes[at + 1];
    if (marker === 0xff) {
      at += 1;
      continue;
    }
    const length = view.getUint16(at + 2);
    const content = bytes.subarray(at + 4, at + 2 + length);
    // Frames of all kinds; the three in between are tables.
    const frame = marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
    if (frame && content.length >= 6) {
      return {
        ...head,
        height: (content[1] << 8) | content[2],
        width: (content[3] << 8) | content[4],
        components: content[5],
      };
    }
    if (marker === 0xe1 && text(content, 0, 6) === "Exif\0\0")
      head.orientation = orientationOf(content.subarray(6));
    if (marker === 0xda) break;
    at += 2 + length;
  }
  return head;
}

// By the browser: without profiles, as Pillow does without them; turned upright by EXIF data, as every browser does.
async function byBrowser(bytes, type) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(new Blob([bytes], { type }), options);
  const { width, height } = bitmap;
  checkSize(height, width, "the image has");
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { height, width, rgba: context.getImageData(0, 0, width, height).data };
}

function hasAlpha(rgba) {
  for (let i = 3; i < rgba.length; i += 4) if (rgba[i] !== 255) return true;
  return false;
}

// Returns {height, width, rgba, notes}.
export async function decode(bytes, usesAlpha) {
  const kind = kindOf(bytes);
  if (kind === null) throw new Error("the file is no PNG, JPEG, WebP or BMP image");
  const notes = [];
  let image;
  if (kind === "image/png") {
    image = await decodePng(bytes);
    if (image.depth === 16) notes.push("Of its 16 bits the upper 8 are used.");
    if (image.exif && orientationOf(image.exif) !== UPRIGHT) {
      notes.push("Its EXIF data name another side as the upper one. The model sees it as it is stored.");
    }
  } else {
    const head = kind === "image/jpeg" ? jpegHead(bytes) : { orientation: UPRIGHT };
    if (head.width) checkSize(head.height, head.width, "the image has");
    try {
      image = await byBrowser(bytes, kind);
    } catch (error) {
      throw error.name === "InvalidStateError"
        ? new Error("the file is damaged, or of a kind that this browser cannot read")
        : error;
    }
    if (head.orientation !== UPRIGHT) {
      notes.push(
        "Turned upright, as its EXIF data say. `quartermap predict` takes files as they are stored.",
      );
    }
    if (head.components === 4)
      notes.push("It has four inks (CMYK). Browsers and Pillow make different colours of them.");
  }
  if (!usesAlpha && hasAlpha(image.rgba)) {
    notes.push("The model takes no transparency. It sees the colours that lie under transparent pixels.");
  }
  if (kind === "image/webp" && hasAlpha(image.rgba))
    notes.push("This browser rounds the colours of transparent pixels.");
  return { height: image.height, width: image.width, rgba: image.rgba, notes };
}
