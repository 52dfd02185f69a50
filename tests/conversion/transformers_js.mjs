// Encodes texts and an image, and classifies it, with transformers.js: node transformers_js.mjs FOLDER NAME < question
import { readFileSync } from 'node:fs';
import {
    env, pipeline, AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage,
} from '@huggingface/transformers';

const [folder, name] = process.argv.slice(2);
const { texts, image, labels, dtype } = JSON.parse(readFileSync(0, 'utf-8'));
env.allowRemoteModels = false;
env.localModelPath = folder;

const list = (tensor) => Array.from(tensor.data, Number);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const processor = await AutoProcessor.from_pretrained(name);
const text_model = await CLIPTextModelWithProjection.from_pretrained(name, { dtype });
const vision_model = await CLIPVisionModelWithProjection.from_pretrained(name, { dtype });
const { pixel_values } = await processor(await RawImage.read(image));
const classify = await pipeline('zero-shot-image-classification', name, { dtype });
const answer = {
    ids: texts.map((text) => list(tokenizer(text).input_ids)),
    text_embeds: list((await text_model(tokenizer(texts, { padding: true, truncation: true }))).text_embeds),
    pixel_values: list(pixel_values),
    image_embeds: list((await vision_model({ pixel_values })).image_embeds),
    scores: await classify(image, labels),
};
console.log('ANSWER' + JSON.stringify(answer));
