// The plan editor: choose a layer's bits, see what the whole model becomes, save the plan.
// It adds up tables that were counted when the page was written (plan_editor.py); it estimates nothing of its own.
"use strict";

const known = (value) => value !== null && value !== undefined;

// ---- sums -----------------------------------------------------------------------------------------------------

// The joint KL of a sum of single layers' costs: BitPlan.expected_kl, JointCurve.joint.
function joint(curve, total) {
  if (!curve.length || total <= 0) return total;
  if (total <= curve[0][0] || curve.length === 1) return (total * curve[0][1]) / curve[0][0];
  let above = curve.findIndex(([anchor]) => anchor >= total);
  if (above < 0) above = curve.length - 1;
  const [[x0, y0], [x1, y1]] = [curve[above - 1], curve[above]];
  return x0 === x1 ? y1 : y0 * (total / x0) ** (Math.log(y1 / y0) / Math.log(x1 / x0));
}

// All numbers of a plan: `bits` is one width per layer, `machine` the index of a device and runtime or -1.
function totals(data, bits, machine) {
  const sum = { bits: 0, weights: 0, bytes: 0, kl: 0, unknown: [], refused: [] };
  const place = data.machines[machine];
  const seconds = place ? [...place.fixed] : null;
  data.layers.forEach((layer, index) => {
    const shape = data.shapes[layer.shape];
    const width = bits[index];
    sum.bits += shape.stored[width];
    sum.bytes += Math.ceil(shape.stored[width] / 8);
    sum.weights += shape.shape[0] * shape.shape[1];
    if (known(layer.kl[width])) sum.kl += layer.kl[width];
    else sum.unknown.push(index);
    if (!place) return;
    const times = shape.seconds[width][machine];
    if (times) times.forEach((value, end) => { seconds[end] += value; });
    else sum.refused.push(index);
  });
  const rest = data.plan.rest;
  const apart = data.fixed_bytes + sum.bytes > data.apart_above_bytes;
  return {
    linearBitsPerWeight: sum.bits / sum.weights,
    modelBitsPerWeight: (sum.bits + rest.stored_bits) / (sum.weights + rest.weights),
    bytes: Math.ceil((sum.bits + rest.stored_bits) / 8),
    kl: sum.unknown.length ? null : joint(data.curve, sum.kl),
    unknown: sum.unknown,
    refused: sum.refused,
    rate: place && !sum.refused.length ? seconds.map((value) => 1 / value) : null,
    memory: place ? place.memory[apart ? 1 : 0] + place.copies * sum.bytes : null,
  };
}

// bits.json of a plan, as `dwindle quantize --plan` reads it.
function planFile(data, bits) {
  const whole = totals(data, bits, -1);
  const edited = bits.some((width, index) => width !== data.layers[index].bits);
  return {
    ...data.plan,
    linear_bits_per_weight: whole.linearBitsPerWeight,
    model_bits_per_weight: whole.modelBitsPerWeight,
    model_bytes: whole.bytes,
    predicted_kl: edited ? null : data.measured.predicted_kl,
    measured_kl: edited ? null : data.measured.measured_kl,
    joint_curve: data.curve,
    notes: edited ? ["edited in report.html"] : [],
    layers: data.layers.map((layer, index) => {
      const shape = data.shapes[layer.shape];
      const group = { group_size: shape.group_size };
      return {
        name: layer.name, bits: bits[index], ...group, symmetric: shape.symmetric, row_scales: shape.row_scales,
        shape: shape.shape, stored_bits: shape.stored[bits[index]], predicted_kl: layer.kl[bits[index]] ?? null,
        alternatives: Object.entries(layer.kl).map(([width, kl]) => (
          { bits: Number(width), ...group, stored_bits: shape.stored[width], predicted_kl: kl })),
      };
    }),
  };
}

// ---- numbers as figures.py writes them -------------------------------------------------------------------------

const DASH = "\u2013", MINUS = "\u2212";
const digits = (value, count = 3) => String(Number(value.toPrecision(count)));
function scaled(value, units) {
  const [scale, unit] = units.find(([from]) => Math.abs(value) >= 0.9995 * from) ?? units.at(-1);
  return `${digits(value / scale)} ${unit}`;
}
const size = (value) => scaled(value, [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]]);
const time = (value) => scaled(value, [[1, "s"], [1e-3, "ms"], [1e-6, "\u00b5s"], [1e-9, "ns"]]);
const number = (value, count = 3) =>
  value !== 0 && Math.abs(value) < 1e-4 ? value.toExponential(1).replace("-", MINUS) : digits(value, count);
const signed = (value, text) => (value === 0 ? "as quantized" : `${value > 0 ? "+" : MINUS}${text(Math.abs(value))}`);

// ---- one editor -------------------------------------------------------------------------------------------------

class PlanEditor {
  constructor(root) {
    this.root = root;
    this.data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    this.start = this.data.layers.map((layer) => layer.bits);
    this.bits = [...this.start];
    this.past = [];
    this.future = [];
    this.machine = this.data.machines.length ? 0 : -1;
    this.colour = "bits";
    this.find = (name) => root.querySelector(`[data-part=${name}]`);
    this.rows = this.data.layers.map((_, index) => root.querySelector(`tr[data-layer="${index}"]`));
    this.prepare();
    this.show();
  }

  prepare() {
    this.root.querySelectorAll("[data-live]").forEach((part) => { part.hidden = false; });
    this.fillMachines();
    this.fillRows();
    this.drawMap();
    if (this.data.layers.every((layer) => !Object.keys(layer.kl).length)) {
      this.find("colour").querySelector("[value=kl]").remove();
    }
    const on = (name, event, act) => this.find(name).addEventListener(event, act);
    on("machine", "change", (event) => { this.machine = Number(event.target.value); this.show(); });
    on("colour", "change", (event) => { this.colour = event.target.value; this.show(); });
    on("filter", "input", () => this.filter());
    on("all", "change", (event) => { this.setShown(Number(event.target.value)); event.target.value = ""; });
    on("undo", "click", () => this.travel(this.past, this.future));
    on("redo", "click", () => this.travel(this.future, this.past));
    on("reset", "click", () => this.change([...this.start]));
    on("save", "click", () => this.save());
  }

  fillMachines() {
    const select = this.find("machine");
    this.data.machines.forEach((machine, index) => {
      select.append(new Option(`${machine.title} \u00b7 ${machine.runtime} on ${machine.unit}`, index));
    });
    const all = this.find("all");
    for (const width of this.data.widths) all.append(new Option(`${width} bits`, width));
  }

  fillRows() {
    const scheme = this.data.plan.scheme === "palettize" ? "palette" : "int";
    this.rows.forEach((row, index) => {
      const select = document.createElement("select");
      const layer = this.data.layers[index];
      select.setAttribute("aria-label", `Bits of ${layer.name}`);
      for (const width of this.data.widths) select.append(new Option(`${scheme}${width}`, width));
      select.addEventListener("change", () => {
        const bits = [...this.bits];
        bits[index] = Number(select.value);
        this.change(bits);
      });
      const cell = row.querySelector("[data-cell=format]");
      cell.replaceChildren(select);
    });
  }

  drawMap() {
    const map = this.find("map");
    const place = this.data.layers.map((layer) => {
      const found = /\.(\d+)\./.exec(layer.name);
      return [found ? Number(found[1]) : 0, layer.name.split(".").at(-1).replace(/_proj$/, "")];
    });
    const blocks = [...new Set(place.map(([block]) => block))].sort((a, b) => a - b);
    const parts = [...new Set(place.map(([, part]) => part))];
    map.style.gridTemplateColumns = `max-content repeat(${blocks.length}, minmax(0, 120px))`;
    map.classList.toggle("fine", blocks.length > 12);
    map.classList.toggle("finest", blocks.length > 40);
    this.cells = [];
    for (const part of parts) {
      const label = document.createElement("b");
      label.textContent = part;
      map.append(label);
      for (const block of blocks) {
        const index = place.findIndex(([b, p]) => b === block && p === part);
        const cell = document.createElement("i");
        if (index < 0) cell.style.visibility = "hidden";
        else this.cells[index] = cell;
        cell.addEventListener("click", () => {
          const select = this.rows[index].querySelector("select");
          this.find("filter").value = "";
          this.filter();
          select.scrollIntoView({ block: "center" });
          select.focus();
        });
        map.append(cell);
      }
    }
  }

  change(bits) {
    if (bits.every((width, index) => width === this.bits[index])) return;
    this.past.push(this.bits);
    this.future = [];
    this.bits = bits;
    this.show();
  }

  travel(from, to) {
    if (!from.length) return;
    to.push(this.bits);
    this.bits = from.pop();
    this.show();
  }

  setShown(width) {
    if (width) this.change(this.bits.map((bits, index) => (this.rows[index].hidden ? bits : width)));
  }

  filter() {
    const words = this.find("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of this.root.querySelectorAll("tbody tr[data-name]")) {
      row.hidden = !words.every((word) => row.dataset.name.toLowerCase().includes(word));
      shown += !row.hidden;
    }
    this.find("shown").textContent = words.length ? `${shown} shown` : "";
  }

  save() {
    const text = `${JSON.stringify(planFile(this.data, this.bits), null, 2)}\n`;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "bits.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // -- showing

  show() {
    const now = totals(this.data, this.bits, this.machine);
    const before = totals(this.data, this.start, this.machine);
    this.tile("bytes", now.bytes, before.bytes, size, -1);
    this.tile("bits", now.linearBitsPerWeight, before.linearBitsPerWeight, (v) => number(v, 4), 0);
    this.tile("rate", now.rate && now.rate[0], before.rate && before.rate[0], (v) => digits(v), 1,
      now.rate ? `${digits(now.rate[2])} to ${digits(now.rate[1])}` : `${now.refused.length} layers refused`);
    this.tile("kl", now.kl, before.kl, (v) => number(v), -1, this.klNote(now));
    const limit = this.machine < 0 ? null : this.data.machines[this.machine].limit;
    const over = known(limit) && now.memory > limit;
    this.tile("memory", now.memory, before.memory, size, -1,
      known(limit) ? `${over ? "over" : "of"} ${size(limit)} for an app` : "");
    this.find("memory").classList.toggle("over", over);
    this.showRows();
    this.showRuntimes();
    this.find("undo").disabled = !this.past.length;
    this.find("redo").disabled = !this.future.length;
    this.find("reset").disabled = this.bits.every((width, index) => width === this.start[index]);
  }

  klNote(now) {
    const { measured_kl: measured } = this.data.measured;
    if (this.data.layers.every((layer) => !Object.keys(layer.kl).length)) return "no sensitivities stored";
    if (now.unknown.length) return `${now.unknown.length} layers not measured so`;
    return known(measured) ? `as quantized: ${number(measured)} measured` : "";
  }

  tile(name, value, before, text, better, note = "") {
    const tile = this.find(name);
    tile.dataset.value = known(value) ? value : "";
    tile.querySelector(".value").textContent = known(value) ? text(value) : DASH;
    const delta = tile.querySelector(".delta");
    const moved = known(value) && known(before) ? value - before : 0;
    const told = moved ? signed(moved, text) : "";
    delta.textContent = [told, note].filter(Boolean).join(" \u00b7 ") || "\u00a0";
    delta.title = delta.textContent;
    delta.className = `delta ${moved * better > 0 ? "better" : moved * better < 0 ? "worse" : ""}`;
  }

  showRows() {
    const { data, bits, machine } = this;
    const facts = data.layers.map((layer, index) => {
      const shape = data.shapes[layer.shape];
      const weights = shape.shape[0] * shape.shape[1];
      const times = machine < 0 ? null : shape.seconds[bits[index]][machine];
      return {
        width: bits[index], weights, bits: shape.stored[bits[index]] / weights,
        bytes: Math.ceil(shape.stored[bits[index]] / 8), kl: layer.kl[bits[index]] ?? null,
        time: times ? times[0] : null,
      };
    });
    const most = (name) => Math.max(...facts.map((fact) => fact[name] ?? 0), 1e-30);
    const top = { bytes: most("bytes"), kl: most("kl"), time: most("time"), bits: Math.log2(2 * Math.max(...data.widths)) };
    this.find("map").classList.toggle("cost", this.colour === "kl");
    facts.forEach((fact, index) => {
      const row = this.rows[index];
      const edited = bits[index] !== this.start[index];
      row.classList.toggle("edited", edited);
      row.classList.toggle("refused", machine >= 0 && fact.time === null);
      row.querySelector("select").value = fact.width;
      row.querySelector("[data-cell=format]").dataset.v = fact.width;
      this.cell(row, "bits", fact.bits, number(fact.bits));
      this.cell(row, "bytes", fact.bytes, size(fact.bytes), fact.bytes / top.bytes);
      this.cell(row, "kl", fact.kl, known(fact.kl) ? number(fact.kl) : DASH, known(fact.kl) ? fact.kl / top.kl : null);
      this.cell(row, "time", fact.time, known(fact.time) ? time(fact.time) : DASH);
      if (edited && row.querySelector("[data-cell=error]")) this.cell(row, "error", null, DASH);
      else if (row.dataset.error !== undefined) this.cell(row, "error", row.dataset.error, row.dataset.errorText);
      const value = this.colour === "bits" ? Math.log2(2 * fact.width) : fact[this.colour];
      const level = Math.round(8 + (92 * (value ?? 0)) / top[this.colour]);
      const cell = this.cells[index];
      cell.style.setProperty("--level", known(value) ? level : 0);
      cell.classList.toggle("edited", edited);
      cell.textContent = fact.width;
      cell.title = `${data.layers[index].name}: ${fact.width} bits, ${size(fact.bytes)}`
        + (known(fact.kl) ? `, KL ${number(fact.kl)}` : "") + (known(fact.time) ? `, ${time(fact.time)}` : "");
    });
  }

  cell(row, name, value, text, share = null) {
    const cell = row.querySelector(`[data-cell=${name}]`);
    if (!cell) return;
    cell.dataset.v = known(value) ? value : "";
    cell.firstChild.textContent = text;
    const bar = cell.querySelector(".bar");
    if (bar) bar.style.width = `${known(share) ? Math.max(1, 100 * share) : 0}%`;
  }

  showRuntimes() {
    const place = this.find("runtimes");
    place.replaceChildren();
    for (const [runtime, title] of Object.entries(this.data.runtimes)) {
      const why = new Map();
      this.data.layers.forEach((layer, index) => {
        const reason = this.data.shapes[layer.shape].refused[this.bits[index]][runtime];
        if (reason) why.set(reason, (why.get(reason) ?? 0) + 1);
      });
      if (this.data.embedding_refused[runtime]) why.set(this.data.embedding_refused[runtime], 1);
      const chip = document.createElement("span");
      const reasons = [...why].map(([reason, count]) => `${count} \u00d7 ${reason}`);
      chip.className = reasons.length ? "failed" : "passed";
      chip.dataset.runtime = runtime;
      chip.textContent = reasons.length ? `${title} cannot carry ${reasons.join("; ")}` : `${title} carries it`;
      place.append(chip);
    }
  }
}

// An editor in a tab that is not open is made when the tab is.
for (const root of document.querySelectorAll("[data-editor]")) {
  if (root.hidden) root.addEventListener("shown", () => new PlanEditor(root), { once: true });
  else new PlanEditor(root);
}
document.documentElement.dataset.ready = String(Math.round(performance.now()));
