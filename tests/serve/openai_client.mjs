// Asks a server with OpenAI's client: node openai_client.mjs ADDRESS MODEL < question
import { readFileSync } from 'node:fs';
import OpenAI from 'openai';

const [address, model] = process.argv.slice(2);
const { texts, images } = JSON.parse(readFileSync(0, 'utf-8'));
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: 'none', maxRetries: 0 });

const embed = async (input, rest) => {
    const answer = await client.embeddings.create({ model, input, ...rest });
    return answer.data.map((row) => Array.from(row.embedding));
};
const error = async (request) => {
    try {
        await client.embeddings.create(request);
    } catch (caught) {
        return [caught.constructor.name, caught.status, caught.code, caught.param];
    }
    return null;
};
const answer = {
    texts: await embed(texts),
    floats: await embed(texts, { encoding_format: 'float' }),
    images: await embed(images),
    few: await embed(texts, { dimensions: 16 }),
    models: (await client.models.list()).data.map((entry) => entry.id),
    unknown: await error({ model: 'gpt', input: 'x' }),
    empty: await error({ model, input: [] }),
};
console.log('ANSWER' + JSON.stringify(answer));
