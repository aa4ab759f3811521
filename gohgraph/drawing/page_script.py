"""What the interactive page does when something is moved or clicked: it fills the columns that its glyphs read."""

# One function for all controls: weights of the chosen token or the means, above the threshold, of the chosen layers.
UPDATE = """
const data = edges.data
const count = data.mean.length
const token = tokens == null || tokens.selected.indices.length == 0 ? -1 : tokens.selected.indices[0]
const chosen = new Set(layers.value)
const shown = new Array(count)
const weight = new Float64Array(count), width = new Float64Array(count), tip = new Float64Array(count)
let drawn = 0
for (let e = 0; e < count; e++) {
  weight[e] = token < 0 ? data.mean[e] : values.data.weight[token * count + e] * scale
  const share = Math.min(Math.abs(weight[e]) / limit, 1)
  width[e] = 0.6 + 4.4 * share
  tip[e] = 4 + 7 * Math.sqrt(share)
  shown[e] = Math.abs(weight[e]) >= threshold.value && (chosen.size == 0 || chosen.has(data.block[e]))
  if (shown[e]) drawn++
}
edges.data = {...data, weight, width, tip}
filter.booleans = shown
const heads_count = heads.data.loop.length
const loop = new Float64Array(heads_count), ink = new Array(heads_count)
for (let h = 0; h < heads_count; h++) {
  loop[h] = token < 0 ? heads.data.loop[h] : loops.data.weight[token * heads_count + h] * scale
  const strong = Math.abs(loop[h]) > 0.5 * limit
  ink[h] = toggle.active ? (strong ? "#1b1d21" : "#dddddd") : (strong ? "#ffffff" : "#333333")
}
heads.data = {...heads.data, weight: loop, ink}
const where = token < 0 ? "mean over tokens" : `at token ${token}`
status.text = `${drawn} of ${count} edges, ${where}`
"""

# Colours of figures are properties; those of widgets come from the variables of the page's style.
THEME = """
const dark = toggle.active
document.documentElement.dataset.theme = dark ? "dark" : "light"
const paper = dark ? "#1b1d21" : "#ffffff", ink = dark ? "#dddddd" : "#333333", line = dark ? "#44474d" : "#e6e6e6"
for (const figure of figures) {
  figure.background_fill_color = paper
  figure.border_fill_color = paper
}
for (const letters of inks) letters.text_color = ink
for (const row of rows) row.line_color = line
for (const outline of outlines) outline.line_color = ink
bar.background_fill_color = paper
bar.major_label_text_color = ink
bar.title_text_color = ink
mapper.palette = dark ? dark_palette : light_palette
if (greys != null) greys.palette = dark ? dark_greys : light_greys
toggle.label = dark ? "light" : "dark"
"""

PREFERENCE = 'toggle.active = window.matchMedia("(prefers-color-scheme: dark)").matches'

STYLE = """
{% block preamble %}
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  :root { --ink: #333333; --paper: #ffffff; }
  :root[data-theme="dark"] { --ink: #dddddd; --paper: #1b1d21; }
  html, body { background: var(--paper); color: var(--ink); font-family: sans-serif; margin: 0.5rem; }
</style>
{% endblock %}
"""
