// Reads a GGUF by llama.cpp (node-llama-cpp) and writes what it gives as JSON: node llama_cpp.mjs JOB.json
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import {pathToFileURL} from "node:url";

const job = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const load = (name) => import(pathToFileURL(path.join(job.node_modules, name)).href);
const {getLlama} = await load("node-llama-cpp/dist/index.js");
const {Template} = await load("@huggingface/jinja/dist/index.js");
// Threads wait for each other by spinning: with one for each core, a busy machine takes twenty times as long.
const maxThreads = Math.max(1, Math.floor(os.availableParallelism() / 2));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads});
const model = await llama.loadModel({modelPath: job.model, gpuLayers: 0});
// Attention in float32, its cache too: in float16, which is the default, logits are off by up to a hundredth.
const context = await model.createContext({
    contextSize: job.context_size, lora: job.adapter ? {adapters: [{filePath: job.adapter}]} : undefined,
    flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();

// The likeliest token after every position from `first` on, and the probability of the token that is expected there.
async function answer({ids, first}) {
    await sequence.clearHistory();
    const asked = ids.slice(0, -1).map((id, place) => place < first - 1 ? id : [id, {generateNext: {probabilities: true}}]);
    const found = await sequence.controlledEvaluate(asked);
    return found.slice(first - 1).map(({next}, place) => {
        const [best] = next.probabilities.entries().next().value;
        return {best, expected: next.probabilities.get(ids[first + place]) ?? 0};
    });
}

const answers = [];
for (const item of job.sequences) answers.push(await answer(item));
const info = model.fileInfo.metadata.tokenizer ?? {};
const tokens = job.texts.map((text) => model.tokenize(text, true));
const special = {bos_token: model.tokens.bosString ?? "", eos_token: model.tokens.eosString ?? ""};
const template = info.chat_template ? new Template(info.chat_template) : null;
const prompts = template && job.conversations.map((variables) => template.render({...special, ...variables}));
const version = JSON.parse(fs.readFileSync(path.join(job.node_modules, "node-llama-cpp/package.json"), "utf8")).version;
fs.writeFileSync(job.result, JSON.stringify({release: llama.llamaCppRelease.release, version, answers, tokens, prompts}));
process.exit(0);
