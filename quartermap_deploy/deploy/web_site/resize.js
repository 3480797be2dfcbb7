// Resizing as Pillow does it, to the last bit: a model that was evaluated on images which Pillow made smaller must not
// be given those of a canvas, whose filters differ from browser to browser.
//
// Pillow resizes along one side and then along the other. Between the two it rounds to 8 bits, and its weights are
// whole numbers with 22 bits after the point. `resizeFloats` is its mode "F", which rounds to float32 instead. `pillow`
// is the major version whose order of the two is taken.

const POINT = 22;

const sinc = x => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));

// How far a filter reaches, in pixels of the smaller image, and its weight at a distance.
const FILTERS = {
  box: { reach: 0.5, weight: x => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  bilinear: { reach: 1, weight: x => Math.max(0, 1 - Math.abs(x)) },
  hamming: {
    reach: 1,
    weight: x => {
      if (Math.abs(x) >= 1) return 0;
      // The two constants are in single precision there.
      return sinc(x) * (Math.fround(0.54) + Math.fround(0.46) * Math.cos(x * Math.PI));
    },
  },
  bicubic: {
    reach: 2,
    weight: signed => {
      const x = Math.abs(signed);
      if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
    },
  },
  lanczos: { reach: 3, weight: x => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

// For each place of the result: where its window begins, how long it is, and the weights in it, whose sum is 1.
function windows(from, to, filter) {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const reach = filter.reach * stretch;
  const inverse = 1 / stretch;
  const longest = Math.ceil(reach) * 2 + 1;
  const starts = new Int32Array(to);
  const lengths = new Int32Array(to);
  const weights = new Float64Array(to * longest);
  for (let place = 0; place < to; place++) {
    const centre = (place + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - reach + 0.5));
    const length = Math.min(from, Math.trunc(centre + reach + 0.5)) - start;
    let sum = 0;
    for (let i = 0; i < length; i++) {
      const weight = filter.weight((i + start - centre + 0.5) * inverse);
      weights[place * longest + i] = weight;
      sum += weight;
    }
    for (let i = 0; sum !== 0 && i < length; i++) weights[place * longest + i] /= sum;
    starts[place] = start;
    lengths[place] = length;
  }
  return { starts, lengths, weights, longest };
}

// One direction: `lines` lines lie `lineStep` apart, and the positions of a line `step` apart, in numbers of the array.
function along(source, target, channels, lines, lineSteps, steps, made, finish) {
  const { starts, lengths, weights, longest } = made;
  for (let line = 0; line < lines; line++) {
    const [from, to] = [line * lineSteps[0], line * lineSteps[1]];
    for (let place = 0; place < starts.length; place++) {
      const first = from + starts[place] * steps[0];
      const at = to + place * steps[1];
      const weight = place * longest;
      for (let channel = 0; channel < channels; channel++) {
        let sum = finish.start;
        for (let i = 0, j = first + channel; i < lengths[place]; i++, j += steps[0])
          sum += source[j] * weights[weight + i];
        target[at + channel] = finish.value(sum);
      }
    }
  }
}

const WHOLE = {
  start: 1 << (POINT - 1),
  // The array that it goes into cuts off what is below 0 or above 255.
  value: sum => sum >> POINT,
  weights: made => {
    const { weights } = made;
    for (let i = 0; i < weights.length; i++) {
      weights[i] = Math.trunc(weights[i] * (1 << POINT) + (weights[i] < 0 ? -0.5 : 0.5));
    }
    return made;
  },
};
const REAL = { start: 0, value: sum => sum, weights: made => made };

// Along the width: columns follow each other in a row. Returns the values and their size.
function acrossColumns(values, channels, [height, width], newWidth, filter, kind, Kind) {
  const found = new Kind(height * newWidth * channels);
  const rows = [width * channels, newWidth * channels];
  along(
    values,
    found,
    channels,
    height,
    rows,
    [channels, channels],
    kind.weights(windows(width, newWidth, filter)),
    kind,
  );
  return [found, [height, newWidth]];
}

function acrossRows(values, channels, [height, width], newHeight, filter, kind, Kind) {
  const found = new Kind(newHeight * width * channels);
  const row = width * channels;
  along(
    values,
    found,
    channels,
    width,
    [channels, channels],
    [row, row],
    kind.weights(windows(height, newHeight, filter)),
    kind,
  );
  return [found, [newHeight, width]];
}

// Pillow 13 begins with the height where that shrinks by more than twice as many pixels as the width; until 12 it never
// did. The rounding in between is another one then.
export function heightFirst([height, width], [newHeight, newWidth], pillow) {
  return pillow >= 13 && newHeight < height && height - newHeight > 2 * (width - newWidth);
}

function inBoth(values, channels, size, newSize, pillow, filter, kind, Kind) {
  const passes = [];
  if (newSize[1] !== size[1]) passes.push([acrossColumns, newSize[1]]);
  if (newSize[0] !== size[0]) passes.push([acrossRows, newSize[0]]);
  if (heightFirst(size, newSize, pillow)) passes.reverse();
  let current = [values, size];
  for (const [pass, side] of passes)
    current = pass(current[0], channels, current[1], side, filter, kind, Kind);
  return current[0];
}

// The pixel of the source for each place. Pillow adds the step up, with the error that this brings.
function nearest(from, to) {
  const step = from / to;
  const found = new Int32Array(to);
  for (let place = 0, at = step * 0.5; place < to; place++, at += step)
    found[place] = Math.min(from - 1, Math.trunc(at));
  return found;
}

function pick(values, channels, [height, width], [newHeight, newWidth]) {
  const [rows, columns] = [nearest(height, newHeight), nearest(width, newWidth)];
  const found = new Uint8ClampedArray(newHeight * newWidth * channels);
  let at = 0;
  for (const row of rows) {
    for (const column of columns) {
      const from = (row * width + column) * channels;
      for (let channel = 0; channel < channels; channel++) found[at++] = values[from + channel];
    }
  }
  return found;
}

// Colours times alpha and back, rounded as Pillow rounds them.
function multiplied(values) {
  const found = new Uint8ClampedArray(values.length);
  for (let i = 0; i < values.length; i += 4) {
    const alpha = values[i + 3];
    for (let channel = 0; channel < 3; channel++) {
      const product = values[i + channel] * alpha + 128;
      found[i + channel] = ((product >> 8) + product) >> 8;
    }
    found[i + 3] = alpha;
  }
  return found;
}

function divided(values) {
  const found = new Uint8ClampedArray(values);
  for (let i = 0; i < values.length; i += 4) {
    const alpha = values[i + 3];
    if (alpha === 0 || alpha === 255) continue;
    for (let channel = 0; channel < 3; channel++)
      found[i + channel] = Math.trunc((255 * values[i + channel]) / alpha);
  }
  return found;
}

// Resize pixels of 8 bits: (height, width, channels), one after the other. Four channels are colours and their alpha.
export function resizePixels(values, channels, size, newSize, interpolation, pillow) {
  if (size[0] === newSize[0] && size[1] === newSize[1]) return values;
  if (interpolation === "nearest") return pick(values, channels, size, newSize);
  const filter = FILTERS[interpolation];
  const resize = pixels => inBoth(pixels, channels, size, newSize, pillow, filter, WHOLE, Uint8ClampedArray);
  return channels === 4 ? divided(resize(multiplied(values))) : resize(values);
}

// Resize a plane of float32, bilinearly.
export function resizeFloats(values, size, newSize, pillow) {
  return inBoth(values, 1, size, newSize, pillow, FILTERS.bilinear, REAL, Float32Array);
}
