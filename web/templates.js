// The server lists templates in the order of the file system, and so does the dialog. The one that needs no download
// comes first among ours, the others by name; those of other packs are left alone.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const FIRST = "try_it";
const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));

app.registerExtension({
  name: "GuidanceInterval.Templates",
  init() {
    const list = api.getWorkflowTemplates?.bind(api);
    if (!list) return;
    api.getWorkflowTemplates = async () => {
      const templates = await list();
      templates[FOLDER]?.sort((a, b) => (b === FIRST) - (a === FIRST) || a.localeCompare(b));
      return templates;
    };
  },
});
