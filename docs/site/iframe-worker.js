// Browsers allow no workers in pages that are opened as files: there, the theme's search runs in a frame. The theme looks for
// a polyfill of this name, and for `IFrameWorker`; without them it would fetch one from elsewhere at each view.
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = `<script src="${url}"></script>`
      this.loaded = new Promise((resolve) => frame.addEventListener("load", resolve)).then(() => {
        frame.contentWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
        return frame.contentWindow
      })
      document.body.append(frame)
    }

    postMessage(data) {
      this.loaded.then((worker) => worker.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
