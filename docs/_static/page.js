// A wide table or code can be scrolled with the keyboard; hints and solutions are open on paper.
for (const box of document.querySelectorAll(".cell_output, .table-wrapper, div.highlight pre")) {
  if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
}
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not(.hide):not([open])")) {
    details.dataset.closed = "";
    details.open = true;
  }
});
addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details[data-closed]")) details.open = false;
});
