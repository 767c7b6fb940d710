// An error, shown above the commands, so that the document does not move: the server's message with its status and request id.

import { find } from "./dom.js";

export function showNotice({ message, status, id }) {
  find("notice-title").textContent = [status || null, id].filter(Boolean).join(" · ");
  find("notice-text").textContent = message;
  find("notice").hidden = false;
}

export function hideNotice() {
  find("notice").hidden = true;
}
