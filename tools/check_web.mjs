// Runs models in ONNX Runtime Web (wasm): node check_web.mjs PACKAGE.json TASK.json, whose answer goes to stdout as JSON.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(process.argv[2]);
const ort = require("onnxruntime-web");
ort.env.wasm.numThreads = 1;

const task = JSON.parse(readFileSync(process.argv[3], "utf8"));
const floats = (path) => new Float32Array(new Uint8Array(readFileSync(path)).buffer);
const samples = floats(task.samples);
const size = task.shape.reduce((a, b) => a * b, 1);
const feeds = [];
for (let i = 0; i < samples.length; i += size) {
  feeds.push({ [task.input]: new ort.Tensor("float32", samples.slice(i, i + size), task.shape) });
}

const sessions = [];
for (const model of task.models) {
  sessions.push(await ort.InferenceSession.create(new Uint8Array(readFileSync(model.path)), { executionProviders: ["wasm"] }));
}
const times = sessions.map(() => []);
for (const [index, model] of task.models.entries()) {
  const outputs = [];
  for (const feed of feeds) outputs.push(...(await sessions[index].run(feed))[sessions[index].outputNames[0]].data);
  writeFileSync(model.outputs, Buffer.from(new Float32Array(outputs).buffer));
}
for (let round = 0; round < task.rounds; round++) {
  for (const [index, session] of sessions.entries()) {
    const start = performance.now();
    await session.run(feeds[round % feeds.length]);
    times[index].push(performance.now() - start);
  }
}
process.stdout.write("\n" + JSON.stringify({ version: ort.env.versions.web, times }) + "\n");
