// Generates src/gen from ../proto. With --check: generates beside it and fails when the two differ, changing nothing.
import { execFileSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, relative } from "node:path";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("..", import.meta.url));
// buf's own npm package would also demand its builds for systems that nothing here runs on.
const buf = { x64: "buf-linux-x64", arm64: "buf-linux-aarch64" }[process.arch] ?? "buf-linux-x64";
const committed = join(root, "src/gen");

function generate(output) {
  const template = readFileSync(join(root, "buf.gen.yaml"), "utf8").replace("out: src/gen", `out: ${output}`);
  execFileSync(join(root, "node_modules/@bufbuild", buf, "bin/buf"), ["generate", "--template", template], { cwd: root, stdio: "inherit" });
}

function filesOf(folder) {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => relative(folder, join(entry.parentPath, entry.name)))
    .sort();
}

if (process.argv.includes("--check")) {
  const fresh = mkdtempSync(join(tmpdir(), "pageport-gen-"));
  try {
    generate(fresh);
    const names = [...new Set([...filesOf(fresh), ...filesOf(committed)])];
    const read = (folder, name) => (filesOf(folder).includes(name) ? readFileSync(join(folder, name), "utf8") : null);
    const drifted = names.filter((name) => read(fresh, name) !== read(committed, name));
    if (drifted.length > 0) {
      console.error(`src/gen is not what ../proto says: ${drifted.join(", ")}. Run \`npm run gen\` and commit.`);
      process.exitCode = 1;
    }
  } finally {
    rmSync(fresh, { recursive: true });
  }
} else {
  generate("src/gen");
}
