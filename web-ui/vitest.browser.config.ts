import { defineConfig } from "vitest/config";

// The built page in a real browser; `npm run test:browser` builds it first.
export default defineConfig({
  test: { include: ["tests/browser/**/*.test.ts"], testTimeout: 60_000, hookTimeout: 60_000, fileParallelism: false },
});
