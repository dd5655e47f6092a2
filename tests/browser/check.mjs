// Opens a report in Chromium as people see it: light, dark, printed, on a telephone; and with its script.
//
//   npm ci && node check.mjs PLAIN.html INTERACTIVE.html [FOLDER for pictures]
//
// CHROMIUM names the browser, else `chromium` is looked for. Exit status 1 where anything is not as it should be.

import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import puppeteer from "puppeteer-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const [plain, interactive, folder] = process.argv.slice(2);
if (!interactive) {
  console.error("usage: node check.mjs PLAIN.html INTERACTIVE.html [FOLDER]");
  process.exit(2);
}
if (folder) mkdirSync(folder, { recursive: true });

let wrong = 0;
const check = (holds, what) => {
  console.log(`${holds ? "ok  " : "FAIL"} ${what}`);
  if (!holds) wrong += 1;
};

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--force-color-profile=srgb"],
});

// A page, with all that it complains of or asks for.
const open = async (file, { width = 1280, scheme = "light" } = {}) => {
  const page = await browser.newPage();
  const complaints = [];
  page.on("pageerror", error => complaints.push(String(error)));
  page.on("console", message => ["error", "warn"].includes(message.type()) && complaints.push(message.text()));
  page.on("request", request => request.url() !== url && complaints.push(`asks for ${request.url()}`));
  const url = pathToFileURL(resolve(file)).href;
  await page.setViewport({ width, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(url, { waitUntil: "load" });
  return { page, complaints };
};

const serious = async page => {
  // The page forbids scripts: the examiner comes in from outside.
  const client = await page.createCDPSession();
  const { executionContextId } = await client.send("Page.createIsolatedWorld", {
    frameId: page.mainFrame()._id,
    worldName: "axe",
  });
  await client.send("Runtime.evaluate", { expression: axe, contextId: executionContextId });
  const { result } = await client.send("Runtime.evaluate", {
    contextId: executionContextId,
    awaitPromise: true,
    returnByValue: true,
    expression: `axe.run(document, { resultTypes: ["violations"] }).then(found => found.violations
      .filter(it => ["serious", "critical"].includes(it.impact))
      .map(it => it.id + " " + it.nodes.slice(0, 3).map(node => node.html.slice(0, 120)).join(" | ")))`,
  });
  return result.value ?? ["axe did not run"];
};

const fits = page => page.evaluate(() => document.documentElement.scrollWidth <= document.documentElement.clientWidth);

for (const [name, file, look] of [
  ["light", plain, {}],
  ["dark", plain, { scheme: "dark" }],
  ["360 px", plain, { width: 360 }],
  ["interactive", interactive, {}],
  ["interactive, dark, 360 px", interactive, { width: 360, scheme: "dark" }],
]) {
  const { page, complaints } = await open(file, look);
  check(complaints.length === 0, `${name}: nothing is asked for, nothing complains ${complaints.slice(0, 3)}`);
  check(await fits(page), `${name}: no sideways scroll`);
  const resources = await page.evaluate(() => performance.getEntriesByType("resource").length);
  check(resources === 0, `${name}: ${resources} resources`);
  const found = await serious(page);
  check(found.length === 0, `${name}: nothing serious for axe ${found.join("\n")}`);
  const steps = await page.evaluate(() => [...document.querySelectorAll("h1,h2,h3")].map(it => +it.tagName[1]));
  check(steps[0] === 1 && steps.every((step, at) => at === 0 || step <= steps[at - 1] + 1), `${name}: headings go down by one`);
  if (folder) await page.screenshot({ path: `${folder}/${name.replaceAll(/\W+/g, "-")}.png`, fullPage: true });
  await page.close();
}

{
  const { page } = await open(plain, { scheme: "dark" });
  const pdf = await page.pdf({ format: "A4", ...(folder ? { path: `${folder}/print.pdf` } : {}) });
  check(pdf.length > 10_000, `print: ${pdf.length} bytes of PDF`);
  await page.emulateMediaType("print");
  const paper = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  check(paper === "rgb(255, 255, 255)", `print: white paper, whatever the screen is: ${paper}`);
  const hidden = await page.evaluate(() => [...document.querySelectorAll("details:not(figure *, .settings) > :not(summary)")]
    .filter(it => it.getBoundingClientRect().height === 0).length);
  check(hidden === 0, `print: ${hidden} of what is folded away are not printed, numbers of charts and settings apart`);
  await page.close();
}

{
  const { page, complaints } = await open(interactive);
  const column = () => page.evaluate(() => [...document.querySelector("#stages tbody").rows].map(row => row.cells[0].textContent));
  const first = await column();
  await page.click("#stages thead .sort");
  const sorted = await column();
  check(String(sorted) === String([...first].sort((a, b) => a.localeCompare(b, "en", { numeric: true }))), "stages sort by name");
  await page.focus("#stages thead th:nth-child(4) .sort");
  await page.keyboard.press("Enter");
  await page.keyboard.press("Enter");
  const times = await page.evaluate(() => [...document.querySelector("#stages tbody").rows]
    .map(row => parseFloat(row.cells[3].dataset.value)).filter(it => !Number.isNaN(it)));
  check(times.length > 2 && times.every((time, at) => at === 0 || time <= times[at - 1]), "and by time, by keys alone, the longest first");
  await page.type("#stages input[type=search]", "evaluate");
  const left = await page.evaluate(() => [...document.querySelector("#stages tbody").rows].filter(row => !row.hidden).map(row => row.cells[0].textContent + row.cells[1].textContent));
  check(left.length > 0 && left.length < first.length && left.every(text => text.toLowerCase().includes("evaluate")), `search leaves ${left.length} of ${first.length}`);
  await page.$eval("#curves svg[data-x]", curves => curves.focus());
  await page.keyboard.press("End");
  const said = await page.evaluate(() => {
    const figure = document.querySelector("#curves svg[data-x]").closest("figure");
    const last = [...figure.querySelectorAll("tbody tr")].at(-1);
    return [figure.querySelector(".reading").textContent, last.cells[0].textContent, last.cells[1].textContent];
  });
  const [text, x, y] = said;
  const read = Number(text.split(": ")[1]?.match(/(-?[\d.]+(?:e[-+]\d+)?)(?:,|$)/)?.[1]);
  check(text.includes(` ${x}: `) && Math.abs(read - y) <= 0.02 * Math.abs(y) + 1e-9, `a curve says its value: “${text}”, in the table ${x}: ${y}`);
  check(complaints.length === 0, `nothing complains ${complaints}`);
  if (folder) await page.screenshot({ path: `${folder}/used.png` });
  await page.close();
}

await browser.close();
console.log(wrong === 0 ? "all as it should be" : `${wrong} not as it should be`);
process.exit(wrong === 0 ? 0 : 1);
