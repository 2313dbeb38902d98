// The WebSocket: comes back by itself, and turns commands into promises of their acknowledgement.

export class Socket {
  constructor(hear, lost) {
    this.hear = hear;
    this.lost = lost;
    this.waiting = new Map();
    this.number = 0;
    this.delay = 500;
    this.connect();
  }

  connect() {
    const address = new URL("ws", location.href);
    address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
    address.search = address.hash = "";
    this.socket = new WebSocket(address);
    this.socket.addEventListener("message", (event) => this.receive(JSON.parse(event.data)));
    this.socket.addEventListener("close", (event) => {
      for (const { reject } of this.waiting.values()) reject(new Error("The connection was lost before the answer came."));
      this.waiting.clear();
      this.lost(event.reason);
      setTimeout(() => this.connect(), this.delay);
      this.delay = Math.min(8000, this.delay * 1.6);
    });
  }

  receive(message) {
    if (message.type === "hello") this.delay = 500;
    const waiting = this.waiting.get(message.id);
    if (waiting && (message.type === "ack" || message.type === "error")) {
      this.waiting.delete(message.id);
      if (message.type === "ack") waiting.resolve(message);
      else waiting.reject(new Error(message.message));
      return;
    }
    this.hear(message);
  }

  // Send a command; resolves with its acknowledgement, which says from which block on it holds.
  command(type, fields = {}) {
    return new Promise((resolve, reject) => {
      if (this.socket.readyState !== WebSocket.OPEN) {
        reject(new Error("Not connected at the moment; one second …"));
        return;
      }
      const id = ++this.number;
      this.waiting.set(id, { resolve, reject });
      this.socket.send(JSON.stringify({ type, id, ...fields }));
    });
  }

  tell(type, fields) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...fields }));
  }
}
