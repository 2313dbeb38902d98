// The prompt box: Enter sends, the arrow keys bring back what was sent before.

export class PromptBox {
  constructor(form, box, send) {
    Object.assign(this, { form, box, send, history: [], place: 0 });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.submit();
      } else if (event.key === "ArrowUp" && box.selectionStart === 0) this.recall(-1, event);
      else if (event.key === "ArrowDown" && box.selectionEnd === box.value.length) this.recall(1, event);
    });
  }

  async submit() {
    const text = this.box.value.trim();
    if (text && (await this.send(text)) && this.history.at(-1) !== text) this.history.push(text);
    this.place = this.history.length;
  }

  recall(step, event) {
    const place = this.place + step;
    if (place < 0 || place > this.history.length) return;
    event.preventDefault();
    this.place = place;
    this.box.value = this.history[place] ?? "";
    const caret = step < 0 ? 0 : this.box.value.length;
    this.box.setSelectionRange(caret, caret);
  }

  // What was sent last, by whomever.
  current(prompt) {
    if (this.history.at(-1) !== prompt) this.history.push(prompt);
    this.place = this.history.length;
    if (!this.box.value && document.activeElement !== this.box) this.box.value = prompt;
  }
}
