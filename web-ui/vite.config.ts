import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vitest/config";

// `npm run dev` serves the page and passes API calls on to a controller's web port.
const controller = process.env["PAGEPORT_WEB"] ?? "http://127.0.0.1:7480";

export default defineConfig({
  plugins: [svelte()],
  build: { target: "es2022", assetsInlineLimit: 0 },
  server: { proxy: { "/pageport.v1.": { target: controller } } },
  test: { include: ["src/**/*.test.ts"] },
});
