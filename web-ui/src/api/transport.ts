// The way to the controller that served this page: gRPC-Web on the same origin.
import type { Transport } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";

export function browserTransport(): Transport {
  return createGrpcWebTransport({ baseUrl: window.location.origin });
}
