import { mount } from "svelte";

import "./app.css";
import App from "./App.svelte";
import { browserTransport } from "./api/transport.ts";

const target = document.getElementById("app");
if (target === null) throw new Error("index.html has no #app");
mount(App, { target, props: { transport: browserTransport() } });
