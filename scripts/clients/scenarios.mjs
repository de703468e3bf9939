// What every npm client is asked, how its answers are judged, and how that is said: JSON lines on stdout.
// `scenarios.py` is its like.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import path from "node:path";

export const QUESTION = "What is the capital of France?";
export const TEXT = "Once upon a time";
export const MESSAGES = [{ role: "user", content: QUESTION }];
export const CITIES = ["Paris", "Bonn", "Rome"];
const city = { type: "string", enum: CITIES };
export const SCHEMA = {
  type: "object",
  properties: { city, rivers: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["city", "rivers"],
  additionalProperties: false,
};
export const FUNCTION = {
  name: "get_weather",
  description: "The weather in a city.",
  parameters: { type: "object", properties: { city }, required: ["city"], additionalProperties: false },
};
export const TOOL = { type: "function", function: FUNCTION };
// The template that the server is started with opens the model's reasoning then.
export const THINKING = { chat_template_kwargs: { enable_thinking: true } };
export const NO_MODEL = "no-such-model";
export const NO_KEY = "no-such-key";
// Tokens: where an answer must be whole, and where it need not.
export const MANY = 64;
export const FEW = 8;

// A package of the client's environment: Node.js would look beside this file alone.
export async function load(name) {
  const at = createRequire(path.join(process.env.TRIAL_MODULES, "beside.js"));
  return import(pathToFileURL(at.resolve(name)));
}

// Every scenario by its name; a failure of one is said, and ends none of the others.
export async function play(scenarios) {
  console.log(JSON.stringify({ scenarios: Object.keys(scenarios) }));
  for (const [name, scenario] of Object.entries(scenarios)) {
    const root = process.env.TRIAL_URL.replace("{scenario}", name);
    let reason = null;
    try {
      await scenario({ root, url: root + "/v1", key: process.env.TRIAL_KEY, model: process.env.TRIAL_MODEL });
    } catch (error) {
      reason = `${error.name}: ${error.message}`;
    }
    console.log(JSON.stringify({ scenario: name, reason }));
  }
  process.exit(0);
}

export function expect(holds, what) {
  if (!holds) throw new Error(`expected ${what}`);
}

export function said(text) {
  expect(typeof text === "string" && text.trim(), `text, found ${JSON.stringify(text)}`);
  return text;
}

export function streamed(pieces, whole) {
  const found = pieces.filter(Boolean);
  expect(found.length > 1, `several pieces, found ${found.length}`);
  expect(found.join("") === whole, `the pieces of ${JSON.stringify(whole)}, found ${JSON.stringify(found)}`);
}

export async function repeats(sample) {
  const first = said(await sample(7));
  expect((await sample(7)) === first, "the same text again from the same seed");
  for (let seed = 100; seed < 110; seed++) if ((await sample(seed)) !== first) return;
  throw new Error("expected another text from another seed");
}

export function fits(value) {
  const found = typeof value === "string" ? JSON.parse(value) : value;
  const whole = CITIES.includes(found.city) && Number.isInteger(found.rivers) && found.rivers >= 0 && found.rivers < 10;
  expect(whole && Object.keys(found).length === 2, `what the schema says, found ${JSON.stringify(found)}`);
}

export function called(name, given) {
  const found = typeof given === "string" ? JSON.parse(given) : given;
  expect(name === FUNCTION.name, `a call of ${FUNCTION.name}, found ${name}`);
  expect(CITIES.includes(found?.city), `a city, found ${JSON.stringify(given)}`);
}

export function likely(logprobs, count) {
  expect(logprobs.length === count, `${count} log-probabilities, found ${logprobs.length}`);
  expect(logprobs.every((value) => value <= 0), `log-probabilities of at most 0, found ${logprobs}`);
}

export function embedded([one, other]) {
  const same = JSON.stringify(one) === JSON.stringify(other);
  expect(one.length > 0 && one.length === other.length && !same, "two different vectors of one length");
}

export async function refused(ask, ...words) {
  let found;
  try {
    found = await ask();
  } catch (error) {
    const text = `${error.constructor.name}: ${error.message}`;
    const missing = words.filter((word) => !text.toLowerCase().includes(word.toLowerCase()));
    expect(missing.length === 0, `an error that says ${missing.join(" and ")}, found ${text}`);
    return;
  }
  throw new Error(`expected an error, found ${JSON.stringify(found)}`);
}
