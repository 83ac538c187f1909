// Runs one file with the adapter that was clicked at. With ?check, compares all samples with PyTorch's numbers, and with
// ?check=URL also posts them there.
import * as ort from "./ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1; // several threads need headers that plain servers do not send
const SIDE = 8;
const ARRAYS = { float32: Float32Array, float64: Float64Array, float16: Uint16Array };
const find = (id) => document.getElementById(id);
const load = async (name) => (await fetch(name)).json();

const [stored, samples, session] = await Promise.all([
  load("adapters.json"), load("samples.json"), ort.InferenceSession.create("model.onnx", { executionProviders: ["wasm"] }),
]);
const adapters = Object.fromEntries(Object.entries(stored).map(([name, inputs]) => [name, toTensors(inputs)]));
const imageInput = session.inputNames.find((name) => !(name in adapters.base));
let active = "base";
let pixels = new Float32Array(SIDE * SIDE);
let running = Promise.resolve();

function toTensors(inputs) {
  return Object.fromEntries(Object.entries(inputs).map(([name, { type, dims, data }]) => {
    const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
    return [name, new ort.Tensor(type, new ARRAYS[type](bytes.buffer), dims)];
  }));
}

async function classify(image, adapter) {
  const feeds = { [imageInput]: new ort.Tensor("float32", Float32Array.from(image), [1, 1, SIDE, SIDE]) };
  const found = await session.run({ ...feeds, ...adapters[adapter] });
  return Array.from(found[session.outputNames[0]].data);
}

// A session runs one call at a time, so each waits for the one before.
function update() {
  running = running.then(async () => {
    const name = active;
    show(await classify(pixels, name));
    find("status").textContent = `computed in this browser, with ${name === "base" ? "no adapter" : `the adapter ${name}`}`;
  });
  return running;
}

function show(logits) {
  const most = Math.max(...logits);
  const powers = logits.map((one) => Math.exp(one - most));
  const sum = powers.reduce((a, b) => a + b);
  [...find("bars").children].forEach((bar, digit) => {
    const share = powers[digit] / sum;
    bar.classList.toggle("best", logits[digit] === most);
    bar.children[1].style.width = `${100 * share}%`;
    bar.children[2].textContent = `${(100 * share).toFixed(1)} %`;
  });
}

function paint(canvas, values) {
  const image = new ImageData(SIDE, SIDE);
  values.forEach((value, i) => image.data.set([255 * value, 255 * value, 255 * value, 255], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function take(values) {
  pixels = Float32Array.from(values);
  paint(find("drawing"), pixels);
  return update();
}

function choose(name) {
  active = name;
  for (const button of find("adapters").children) button.ariaPressed = String(button.dataset.adapter === name);
  return update();
}

function draw(event) {
  if (!event.buttons) return;
  const box = find("drawing").getBoundingClientRect();
  const x = SIDE * (event.clientX - box.left) / box.width - 0.5, y = SIDE * (event.clientY - box.top) / box.height - 0.5;
  take(pixels.map((value, i) => {
    const distance = Math.hypot(i % SIDE - x, Math.floor(i / SIDE) - y);
    return Math.max(value, Math.min(1, Math.max(0, 1.4 - distance)));
  }));
}

for (const name of Object.keys(adapters)) {
  const button = Object.assign(document.createElement("button"), { textContent: name === "base" ? "no adapter" : name });
  button.dataset.adapter = name;
  button.onclick = () => choose(name);
  find("adapters").append(button, " ");
}
for (let digit = 0; digit < 10; digit++) {
  const bar = Object.assign(document.createElement("div"), { className: "bar" });
  bar.innerHTML = `<span>${digit}</span><div></div><span></span>`;
  find("bars").append(bar);
}
for (const [name, { images, labels }] of Object.entries(samples)) {
  const row = document.createElement("div");
  images.forEach((image, i) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE, title: `a ${labels[i]}, ${name}` });
    paint(canvas, image);
    canvas.onclick = () => take(image);
    row.append(canvas);
  });
  find("samples").append(row);
}
find("drawing").onpointerdown = find("drawing").onpointermove = draw;
find("clear").onclick = () => take(new Float32Array(SIDE * SIDE));
find("invert").onclick = () => take(pixels.map((value) => 1 - value));
find("turn").onclick = () => take(pixels.map((_, i) => pixels[(i % SIDE) * SIDE + SIDE - 1 - Math.floor(i / SIDE)]));

const wanted = new URLSearchParams(location.search);
await take(samples[wanted.get("sample") ?? "base"].images[3]);
await choose(wanted.get("adapter") ?? "base");

// Clicks at every adapter, asks for every sample, and says by how much the numbers differ from PyTorch's.
async function check() {
  const found = {};
  let largest = 0;
  for (const button of find("adapters").children) {
    button.click();
    await running;
    const { images, logits } = samples[button.dataset.adapter];
    found[active] = [];
    for (const [i, image] of images.entries()) {
      const numbers = await classify(image, active);
      found[active].push(numbers);
      numbers.forEach((one, j) => { largest = Math.max(largest, Math.abs(one - logits[i][j])); });
    }
  }
  find("status").textContent = `largest difference from PyTorch: ${largest.toExponential(1)}`;
  return found;
}

if (wanted.has("check")) {
  const found = await check();
  if (wanted.get("check")) await fetch(wanted.get("check"), { method: "POST", body: JSON.stringify(found) });
}
