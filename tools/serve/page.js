"use strict";
// A chat with the server that this page came from; nothing else is asked, and text is never read as markup.
const one = (id) => document.getElementById(id);
let messages = [];
let under_way = null;

function say(kind, text) {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = text;
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

async function send(text) {
  const talk = messages; // another one after Clear
  talk.push({ role: "user", content: text });
  say("user", text);
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
  send(text);
});
one("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    one("form").requestSubmit();
  }
});
one("stop").addEventListener("click", () => under_way?.abort());
one("clear").addEventListener("click", () => {
  under_way?.abort();
  messages = [];
  one("talk").replaceChildren();
});
asked("/v1/models").then((reply) => reply.json()).then((list) => {
  for (const { id } of list.data) one("model").append(new Option(id, id));
}).catch((error) => say("error", error.message));
