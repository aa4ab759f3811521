"""What the interactive page does when something is moved or clicked: it fills the columns that its glyphs read."""

# What stands at the axes, by the nearest row or column.
NAME_ROWS = """
const {y, title} = source.data
let best = 0
for (let r = 0; r < title.length; r++) if (Math.abs(y[r] - tick) < Math.abs(y[best] - tick)) best = r
return title[best]
"""
NAME_COLUMNS = NAME_ROWS.replace("{y,", "{x,").replace("y[", "x[")

# What a slider says: its end is a root, so that weak weights, which are most, have as much room as strong ones.
SQUARED = "return (tick * tick).toPrecision(2)"

# One function for all controls: weights of the chosen token or the means, above the threshold, of the chosen layers and
# sites; what a chosen head or edge has nothing to do with is faint. It does anew only what a change touches.
UPDATE = """
// Where edges run is one row of numbers, which is cut into as many as there are edges.
const opened = () => {
  const cut = (row) => {
    const points = new Float32Array(row), length = points.length / edges.data.mean.length
    return Array.from(edges.data.mean, (_, e) => points.subarray(e * length, (e + 1) * length))
  }
  edges.setv({data: {...edges.data, xs: cut(paths.data.x), ys: cut(paths.data.y)}}, {silent: true})
  return {}
}
const state = edges._page ??= opened()
const redraw = () => {
const data = edges.data, count = data.mean.length, size = heads.data.x.length
const token = tokens == null || tokens.selected.indices.length == 0 ? -1 : tokens.selected.indices[0]
const head = heads.selected.indices.length ? heads.selected.indices[0] : -1
const edge = head < 0 && edges.selected.indices.length ? edges.selected.indices[0] : -1
const chosen = new Set(layers.value), of_site = sites == null ? null : new Set(sites.active.map((n) => sites.labels[n]))
const least = threshold.value * threshold.value
const shown = new Array(count), tipped = new Array(count)
const weight = new Float64Array(count), strengths = new Float64Array(count)
let drawn = 0
for (let e = 0; e < count; e++) {
  weight[e] = token < 0 ? data.mean[e] : values.data.weight[token * count + e] * scale
  shown[e] = Math.abs(weight[e]) >= least && (chosen.size == 0 || chosen.has(data.block[e]))
    && (of_site == null || of_site.has(data.site[e]))
  if (shown[e]) strengths[drawn++] = Math.abs(weight[e])
}
// The more edges, the thinner each, and the strongest alone have tips: a crowd can be read, and is drawn soon.
const thin = Math.min(1, Math.sqrt(many / drawn))
const least_tipped = drawn <= 2 * many ? 0 : strengths.subarray(0, drawn).sort()[drawn - 2 * many]
const width = new Float64Array(count), tip = new Float64Array(count), alpha = new Float64Array(count)
for (let e = 0; e < count; e++) {
  const share = Math.min(Math.abs(weight[e]) / limit, 1)
  const touched = head < 0 && edge < 0 || e == edge || head >= 0 && (data.from[e] == head || data.to[e] == head)
  alpha[e] = touched ? 1 : 0.06
  width[e] = (0.6 + 4.4 * share) * (touched && head + edge > -2 ? 1 : thin)
  tip[e] = (4 + 7 * Math.sqrt(share)) * Math.max(0.6, thin)
  tipped[e] = shown[e] && touched && (Math.abs(weight[e]) >= least_tipped || head + edge > -2)
}
const moved = {}, placed = {}
// Rows that are not chosen move together: between two of them a tenth of the room is left, beside one that is half.
if (state.layers !== layers.value.join()) {
  state.layers = layers.value.join()
  state.base ??= {ys: data.ys, tip_y: data.tip_y, y: heads.data.y, names: Object.keys(heads.data).filter(
    (name) => name.startsWith("radius_") || name.startsWith("side_")), sizes: {...heads.data}, height: plot.height,
    end: plot.y_range.end}
  const base = state.base, from = rows.data.base, count_rows = from.length
  const kept = rows.data.title.map((title) => chosen.size == 0 || chosen.has(title))
  const to = [0]
  const room = [0.1, 0.55, 1]
  for (let r = 1; r < count_rows; r++) to.push(to[r - 1] + (from[r] - from[r - 1]) * room[kept[r] + kept[r - 1]])
  const gap = count_rows > 1 ? from[1] - from[0] : 1
  const move = (y) => {
    const r = Math.max(0, Math.min(count_rows - 2, Math.floor(y / gap)))
    if (count_rows < 2 || y <= 0) return y
    return y >= from[count_rows - 1] ? to[count_rows - 1] + y - from[count_rows - 1]
      : to[r] + (y - from[r]) / gap * (to[r + 1] - to[r])
  }
  moved.ys = base.ys.map((line) => line.map(move))
  moved.tip_y = Array.from(base.tip_y, move)
  placed.y = Array.from(base.y, move)
  for (const name of base.names) {
    placed[name] = Array.from(base.sizes[name], (size, h) => kept[heads.data.row[h]] ? size : 0.3 * size)
  }
  placed.number = base.sizes.number.map((number, h) => kept[heads.data.row[h]] ? number : "")
  rows.data = {...rows.data, y: to}
  row_ticks.ticks = to.filter((_, r) => kept[r])
  const end = move(base.end), bottom = plot.y_range.start
  plot.y_range.end = end
  plot.y_range.reset_end = end
  plot.height = Math.max(220, Math.round(130 + (base.height - 130) * (end - bottom) / (base.end - bottom)))
}
// One redrawing for all: a filter that changes reads the data again, and nobody else does so.
const same = (now, then) => then != null && now.every((is, e) => is == then[e])
const is_read = !same(shown, filter.booleans) && !same(tipped, tips.booleans)
edges.setv({data: {...data, ...moved, weight, width, tip, alpha}}, {silent: true})
filter.booleans = shown
tips.booleans = tipped
if (!is_read) edges.change.emit()
const seen = [token, state.layers].join()
if (state.seen !== seen) {
  state.seen = seen
  for (let ring = 0; ring < rings; ring++) {
    const loop = new Float64Array(size)
    for (let h = 0; h < size; h++) {
      const at = (token * rings + ring) * size + h
      loop[h] = token < 0 ? heads.data[`mean_${ring}`][h] : loops.data.weight[at] * scale
    }
    placed[`loop_${ring}`] = loop
  }
  heads.data = {...heads.data, ...placed}
}
// Letters that change are measured anew: those that are too small to be seen do not.
const spelt = [seen, toggle.active].join()
if (letters.visible && state.spelt !== spelt) {
  state.spelt = spelt
  const [faint, strong] = toggle.active ? ["#dddddd", "#1b1d21"] : ["#333333", "#ffffff"]
  const {x, y, number, loop_0} = heads.data
  const ink = Array.from(loop_0, (loop) => Math.abs(loop) > 0.5 * limit ? strong : faint)
  letters.data_source.data = {x, y, number, ink}
}
const where = token < 0 ? mean_of : `, at token ${token}, \\u201c${tokens.data.text[token]}\\u201d`
const whole = total.toLocaleString("en")
const here = count < total ? ` (${count.toLocaleString("en")} on this page)` : ""
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;")
status.text = plain(`${drawn.toLocaleString("en")} of ${whole} edges${here}${where}`)

// What is told of the chosen head or edge.
const told_of = [token, head, edge].join()
if (state.told_of === told_of) return
state.told_of = told_of
const signed = (number) => `${number < 0 ? "\\u2212" : "+"}${Math.abs(number).toFixed(3)}`
const strongest = (end, other) => {
  const own = []
  for (let e = 0; e < count; e++) if (data[end][e] == head && Math.abs(weight[e]) > 0) own.push(e)
  own.sort((a, b) => Math.abs(weight[b]) - Math.abs(weight[a]))
  const told = own.slice(0, 6).map(
    (e) => `${plain(data[other][e])} ${signed(weight[e])} <small>${plain(data.site[e])}</small>`)
  return told.length ? told.join(", ") : "nobody on this page"
}
if (head >= 0) {
  about.text = `<b>${plain(heads.data.block[head])}, head ${plain(heads.data.number[head])}</b><br>`
    + `hears ${strongest("to", "sender")}<br>is heard by ${strongest("from", "receiver")}`
} else if (edge >= 0) {
  const side = {queries: "the queries: what its receiver looks for", keys: "the keys: where its receiver is found",
    values: "the values: what is read there", scores: "the scores: where the receiver attends, with the sender",
    weights: "the weights after the softmax", outputs: "the outputs: what the receiver writes"}
  about.text = `<b>${plain(data.sender[edge])} \\u2192 ${plain(data.receiver[edge])}</b> `
    + `${signed(weight[edge])}<br>into ` + plain(side[data.site[edge]] || data.site[edge])
} else {
  about.text = hint
}
if (patterns != null) {
  const ends = head >= 0 ? [head, -1] : edge >= 0 ? [data.from[edge], data.to[edge]] : [-1, -1]
  for (const [n, node] of ends.entries()) {
    const number = node < 0 ? -1 : patterns.data.pattern[node], figure = figures[n]
    figure.visible = number >= 0
    if (number < 0) continue
    const found = {x: [], y: [], weight: [], shade: [], query: [], key: []}
    const name = (n) => tokens == null || n >= tokens.data.text.length ? `${n}` : `${n}: ${tokens.data.text[n]}`
    for (let t = 0; t < patterns.data.queries[node]; t++) for (let s = 0; s < patterns.data.keys[node]; s++) {
      const shade = bytes.data.weight[(number * side + t) * side + s] / 255
      if (shade < 0.02) continue
      found.x.push(s), found.y.push(t), found.shade.push(shade), found.weight.push(shade * shade)
      found.query.push(name(t)), found.key.push(name(s))
    }
    cells[n].data = found
    figure.x_range.end = patterns.data.keys[node] - 0.5
    figure.y_range.start = patterns.data.queries[node] - 0.5
    marks[n].data = {y: token >= 0 && token < patterns.data.queries[node] ? [token] : []}
    const part = side < asked ? `, ${side} of ${asked} tokens` : ""
    figure.title.text = `${edge < 0 ? "pattern of" : n == 0 ? "sender" : "receiver"} ${heads.data.label[node]}${part}`
  }
}
}
// The changes of one frame are drawn once, so that a slider that is dragged never waits for what it has left behind.
const after = () => requestAnimationFrame(() => {
  const again = state.again
  state.again = null
  if (again == null) return state.waits = false
  again()
  after()
})
if (state.waits) {
  state.again = redraw
} else {
  state.waits = true
  redraw()
  after()
}
"""

# Letters are as large as there is room for, numbers at the axis as many.
VIEW = """
const scale = plot.inner_width / Math.abs(plot.x_range.end - plot.x_range.start)
const pixels = Math.min(14, Math.floor(1.1 * radius * scale))
letters.glyph.text_font_size = `${Math.max(pixels, 7)}px`
letters.visible = pixels >= 7
const {x} = columns.data
const between = x.length > 1 ? Math.abs(x[1] - x[0]) * scale : 100
const step = [1, 2, 4, 8, 16, 32].find((step) => step * between >= 16) || 64
column_ticks.ticks = Array.from(x).filter((_, n) => n % step == 0)
"""

STRIP_VIEW = """
const room = strip.inner_width / (strip.x_range.end - strip.x_range.start)
texts.text_font_size = `${Math.max(5, Math.min(12, Math.floor(1.66 * room)))}px`
"""

KEYS = """
window.addEventListener("keydown", (event) => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key]
  const inside = event.composedPath()[0].tagName == "INPUT" || event.composedPath().some((at) => at.role == "slider")
  if (step == null || inside) return
  const count = tokens.data.text.length, now = tokens.selected.indices
  const next = now.length ? now[0] + step : step > 0 ? 0 : count - 1
  tokens.selected.indices = next < 0 || next >= count ? [] : [next]
  event.preventDefault()
})
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
for (const title of titles) title.text_color = ink
for (const legend of legends) legend.label_text_color = ink
for (const axis of axes) {
  axis.major_label_text_color = ink
  axis.axis_label_text_color = ink
}
for (const row of rows) row.line_color = line
for (const outline of outlines) outline.line_color = ink
bar.background_fill_color = paper
bar.major_label_text_color = ink
bar.title_text_color = ink
mapper.palette = dark ? dark_palette : light_palette
if (greys != null) greys.palette = dark ? dark_greys : light_greys
if (shades != null) shades.palette = dark ? dark_shades : light_shades
toggle.label = dark ? "light" : "dark"
"""

PREFERENCE = 'toggle.active = window.matchMedia("(prefers-color-scheme: dark)").matches'

STYLE = """
{% block preamble %}
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  :root { --ink: #333333; --paper: #ffffff; }
  :root[data-theme="dark"] { --ink: #dddddd; --paper: #1b1d21; }
  html, body { background: var(--paper); color: var(--ink); font-family: sans-serif; margin: 0.5rem; overflow-x: clip; }
  #below { display: flex; flex-wrap: wrap; }
  #plot { flex: 1 1 300px; min-width: 300px; max-width: 1400px; }
  #beside { width: 300px; position: sticky; top: 8px; align-self: flex-start; }
</style>
{% endblock %}
{% block contents %}
{% for root in roots if root.name != "network" and not root.tags %}{{ embed(root) }}{% endfor %}
<div id="below">
  <div id="plot">{{ embed(roots.network) }}</div>
  <div id="beside">{% for root in roots if "beside" in root.tags %}{{ embed(root) }}{% endfor %}</div>
</div>
{% for root in roots if "under" in root.tags %}{{ embed(root) }}{% endfor %}
{% endblock %}
"""
