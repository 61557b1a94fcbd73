"use strict";
// A chat with the server that this page came from; nothing else is asked, and text is never read as markup.
const one = (id) => document.getElementById(id);
let messages = [];
let under_way = null;
let pictures = []; // data: URLs that go with the next message

function image(url) {
  const shown = document.createElement("img");
  shown.src = url;
  shown.alt = "picture";
  return shown;
}

function say(kind, text, urls = []) {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = text;
  line.prepend(...urls.map(image));
  one("talk").append(line);
  line.scrollIntoView({ block: "end" });
  return line;
}

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function asked(path, options = {}) {
  const reply = await fetch(path, { ...options, headers: headers() });
  if (reply.status === 401) {
    const key = prompt("This server asks for a key");
    if (key) {
      sessionStorage.setItem("key", key);
      return asked(path, options);
    }
  }
  if (!reply.ok) {
    const body = await reply.json().catch(() => ({}));
    throw new Error(body.error?.message ?? `status ${reply.status}`);
  }
  return reply;
}

async function* events(reply) {
  let held = "";
  for await (const text of read(reply.body.pipeThrough(new TextDecoderStream()))) {
    held += text;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function* read(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

async function send(text, urls) {
  const talk = messages; // another one after Clear
  const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  talk.push({ role: "user", content: urls.length ? [...parts, { type: "text", text }] : text });
  say("user", text, urls);
  const line = say("assistant", "");
  under_way = new AbortController();
  one("send").disabled = true;
  one("stop").disabled = false;
  let first = 0, tokens = 0;
  try {
    const body = JSON.stringify({
      model: one("model").value, messages: talk, stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    });
    const reply = await asked("/v1/chat/completions", { method: "POST", body, signal: under_way.signal });
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new Error(chunk.error.message);
      line.textContent += chunk.choices[0]?.delta.content ?? "";
      line.scrollIntoView({ block: "end" });
      tokens = chunk.usage?.completion_tokens ?? tokens;
      if (tokens && !first) first = performance.now();
      const seconds = (performance.now() - first) / 1000;
      if (tokens > 1) one("rate").textContent = `${tokens} tokens, ${((tokens - 1) / seconds).toFixed(1)} tokens/s`;
    }
  } catch (error) {
    if (error.name !== "AbortError") say("error", error.message);
  }
  if (line.textContent) talk.push({ role: "assistant", content: line.textContent });
  else talk.pop(); // what was not answered is not asked again with the next question
  under_way = null;
  one("send").disabled = false;
  one("stop").disabled = true;
}

one("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = one("text").value.trim();
  if (!text || under_way) return;
  one("text").value = "";
  send(text, show([]));
});
one("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    one("form").requestSubmit();
  }
});
// What waits to be sent, which is shown above the text; a click takes a picture away.
function show(urls) {
  const before = pictures;
  pictures = urls;
  one("pictures").replaceChildren(...urls.map((url) => {
    const item = document.createElement("li");
    item.append(image(url));
    item.title = "Click to remove";
    item.addEventListener("click", () => show(pictures.filter((other) => other !== url)));
    return item;
  }));
  return before;
}

function take(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.addEventListener("load", () => show([...pictures, reader.result]));
    reader.readAsDataURL(file);
  }
}

const sees = () => !one("add").hidden;
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // else the browser opens the file in the place of this page
    document.body.classList.toggle("dropping", kind === "dragover" && sees());
    if (kind === "drop" && sees()) take(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => {
  if (sees()) take(event.clipboardData.files);
});
one("file").addEventListener("change", () => {
  take(one("file").files);
  one("file").value = "";
});
one("stop").addEventListener("click", () => under_way?.abort());
one("clear").addEventListener("click", () => {
  under_way?.abort();
  messages = [];
  show([]);
  one("talk").replaceChildren();
});
asked("/v1/models").then((reply) => reply.json()).then((list) => {
  for (const { id } of list.data) one("model").append(new Option(id, id));
  const sizes = list.data[0]?.tyir?.images ?? [];
  one("add").hidden = !sizes.length;
  one("add").title = `Sizes: ${sizes.join(", ")}`;
}).catch((error) => say("error", error.message));
