// The server lists templates in the order of the file system, and so does the dialog. Ours are numbered in the order in
// which one would try them; those of other packs are left alone.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));

app.registerExtension({
  name: "GuidanceInterval.Templates",
  init() {
    const list = api.getWorkflowTemplates?.bind(api);
    if (!list) return;
    api.getWorkflowTemplates = async () => {
      const templates = await list();
      templates[FOLDER]?.sort((a, b) => a.localeCompare(b));
      return templates;
    };
  },
});
