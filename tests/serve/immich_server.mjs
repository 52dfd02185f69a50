// Asks a server as Immich's does: node immich_server.mjs ADDRESS < question. One answer for each payload.
import { readFileSync } from 'node:fs';

const [address] = process.argv.slice(2);
const answers = [];
for (const { entries, image, text } of JSON.parse(readFileSync(0, 'utf-8'))) {
    const form = new FormData();
    form.append('entries', JSON.stringify(entries));
    if (image !== undefined) {
        form.append('image', new Blob([new Uint8Array(readFileSync(image))]));
    } else {
        form.append('text', text);
    }
    const response = await fetch(new URL('/predict', address), { method: 'POST', body: form });
    answers.push({ ok: response.ok, body: await response.json() });
}
const ping = await fetch(new URL('/ping', address));
console.log('ANSWER' + JSON.stringify({ ping: [ping.ok, await ping.text()], answers }));
