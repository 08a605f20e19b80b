// Tint's word on WGSL files: node lint.mjs FOLDER-OF-THE-PACKAGE-WEBGPU FILE… prints [[file, message]…] as JSON.
import { readFileSync, writeSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, ...files] = process.argv.slice(2);
const { create } = await import(pathToFileURL(`${folder}/index.js`).href);
globalThis.gpu = create(["backend=null"]); // collected before its device, it would take the process with it
const adapter = await gpu.requestAdapter();
const device = await adapter.requestDevice();
const found = [];
for (const file of files) {
  device.pushErrorScope("validation");
  const code = readFileSync(file, "utf8");
  const module = device.createShaderModule({ code });
  const { messages } = await module.getCompilationInfo();
  for (const m of messages) found.push([file, `${m.type} ${m.lineNum}:${m.linePos} ${m.message}`]);
  const entryPoint = /fn (\w+)\(\s*@builtin/.exec(code)[1];
  device.createComputePipeline({ layout: "auto", compute: { module, entryPoint } });
  const error = await device.popErrorScope();
  if (error) found.push([file, error.message]);
}
writeSync(1, JSON.stringify(found) + "\n");
process.exit(0);
