"""What the eight experiments of the PES paper have in common: settings, seeds in parallel, the record, the page.

P. Vicol, L. Metz, J. Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
Evolution Strategies", ICML 2021 (arXiv 2112.13835).

A script defines one `Experiment` and calls `main`. That writes <workdir>/<name>/figure.png and result.json, renews
<workdir>/index.html from all results there are, prints the verdict, and exits with 1 if the paper's finding was not
seen.
"""

import html
import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from absl import flags, logging
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from lopt import base, checks, command_line
from lopt.outer import parallel
from lopt.runs import files

COLORS = {
  "PES": "#d62728",
  "PES+Analytic": "#8c1c13",
  "NRES": "#ff7f0e",
  "truncated ES": "#1f77b4",
  "full ES": "#17becf",
  "TBPTT": "#2ca02c",
  "full BPTT": "#0b5d1e",
  "RTRL": "#9467bd",
  "UORO": "#e377c2",
  "random search": "#7f7f7f",
}
"""One colour for one estimator, in every figure."""

STYLE: dict[Any, Any] = {
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#e0e0e0",
  "grid.linewidth": 0.5,
  "legend.frameon": False,
  "figure.dpi": 120,
}


class Finding(NamedTuple):
  """What an experiment found."""

  figure: Figure
  verdict: str  # one line with the numbers that decide it
  holds: bool  # whether the paper's finding was seen
  table: Sequence[Sequence[str]]  # the first row is the header
  remarks: str = ""  # where this differs from the paper, and what was found otherwise


class Experiment(NamedTuple):
  """One experiment of the paper."""

  number: int
  title: str
  paper_says: str
  quick: Any  # settings, a NamedTuple with a field `seed`: at most 5 minutes on 2 cores
  full: Any  # the paper's sizes
  run: Callable[[Any], Finding]


class Training(NamedTuple):
  """Outer training from several seeds, recorded R times at equal distances."""

  theta: base.Theta  # leaves [seeds, R + 1, ...]: at the start and at every record
  meta_loss: Float[np.ndarray, "seeds R"]  # means over the outer steps between two records
  gradient: base.Theta  # leaves [seeds, R, ...]: means of the meta-gradient over the same steps
  inner_steps: Float[np.ndarray, "seeds R"]  # taken so far by all particles together
  metrics: Mapping[str, Float[np.ndarray, "seeds R"]]  # all that the estimator reports, means over the same steps


def train(
  estimator: base.GradientEstimator,
  optimizer: optax.GradientTransformation,
  init_theta: Callable[[base.PRNGKey], base.Theta],
  *,
  num_steps: int,
  num_records: int,
  num_seeds: int,
  seed: int = 0,
  label: str = "",
) -> Training:
  """Takes `num_steps` outer steps from each of `num_seeds` seeds; the seeds run in parallel, one to a core.

  Args:
    estimator: Of the meta-gradient.
    optimizer: Of θ.
    init_theta: `(key) -> theta`.
    num_steps: Outer steps, a multiple of `num_records`.
    num_records: R, how many times θ is recorded; also how often the progress bar moves.
    num_seeds: Independent runs.
    seed: Another number gives other runs.
    label: For the progress bar.

  Raises:
    ValueError: For counts below 1, or `num_steps` not a multiple of `num_records`.
  """
  checks.counts(num_steps=num_steps, num_records=num_records, num_seeds=num_seeds)
  checks.require(num_steps % num_records == 0, "num_steps", num_steps, f"a multiple of num_records={num_records}")
  steps_per_record = num_steps // num_records

  def start(_: None, key: base.PRNGKey):
    theta_key, particles_key, key = jax.random.split(key, 3)
    theta = init_theta(theta_key)
    return key, theta, optimizer.init(theta), estimator.init(particles_key, theta)

  def advance(first: base.Scalar, run):
    key, theta, optimizer_state, particles = run

    def outer_step(carry, i):
      theta, optimizer_state, particles = carry
      gradient, particles, metrics = estimator.estimate(jax.random.fold_in(key, first + i), theta, particles)
      updates, optimizer_state = optimizer.update(gradient, optimizer_state, theta)
      carry = optax.apply_updates(theta, updates), optimizer_state, particles
      return carry, (gradient, metrics)

    carry, records = jax.lax.scan(outer_step, (theta, optimizer_state, particles), jnp.arange(steps_per_record))
    return (key, *carry), jax.tree.map(lambda x: jnp.mean(x, axis=0), records)

  runs = jax.jit(lambda keys: parallel.map_runs(start, None, keys))(jax.random.split(jax.random.key(seed), num_seeds))
  program = jax.jit(lambda first, runs: parallel.map_runs(advance, first, runs))
  thetas, records = [jax.device_get(runs[1])], []
  for i in tqdm(range(num_records), desc=label, unit_scale=steps_per_record, unit="outer step", dynamic_ncols=True):
    runs, record = program(jnp.int32(i * steps_per_record), runs)
    records.append(jax.device_get(record))
    thetas.append(jax.device_get(runs[1]))
  stack = lambda trees: jax.tree.map(lambda *x: np.stack(x, axis=1), *trees)
  gradient, metrics = stack(records)
  groups = jax.tree.leaves(runs[3])[0].shape[1]  # of which the metrics are means
  inner_steps = np.cumsum(groups * steps_per_record * metrics["inner_steps"].astype(np.float64), axis=1)
  return Training(stack(thetas), metrics["meta_loss"], gradient, inner_steps, metrics)


def band(axes: Axes, x: Any, values: Float[np.ndarray, "seeds n"], label: str, **style: Any) -> None:
  """The seeds' mean as a line, their lowest to highest as a band, in the colour that `label` has everywhere."""
  style = {"color": COLORS.get(label), **style}
  (line,) = axes.plot(x, values.mean(axis=0), label=label, **style)
  axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)


def mean_and_error(values: Any) -> str:
  """`12.34 ± 0.41` or `(3.4 ± 1.1)e-12`: the mean of independent values and its standard error, to two digits."""
  values = np.asarray(values, np.float64).ravel()
  if not np.all(np.isfinite(values)):
    return f"{np.mean(values):.4g}"
  mean = np.mean(values)
  error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
  if error <= 1e-4 * abs(mean):  # beyond the digits that are printed
    return f"{mean:.4g}"
  exponent = int(np.floor(np.log10(max(abs(mean), error))))
  if not -4 <= exponent < 6:
    return f"({mean_and_error(values / 10.0**exponent)})e{exponent}"
  digits = max(0, 1 - int(np.floor(np.log10(error))))
  return f"{mean:.{digits}f} ± {error:.{digits}f}"


def lower(a: Any, b: Any) -> bool:
  """Whether the mean of `a` lies below that of `b` by more than 2 standard errors of the difference.

  Both hold independent values, one a seed; at least two each.
  """
  a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
  error = np.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
  return bool(np.mean(b) - np.mean(a) > 2 * error)  # false for NaN


def main(experiment: Experiment) -> None:
  """Runs the experiment as a script: `--scale`, `--seed`, `--workdir`."""
  flags.DEFINE_enum("scale", "quick", ["quick", "full"], "Minutes on a laptop, or the paper's sizes.")
  flags.DEFINE_integer("seed", 0, "Another number gives other runs.", lower_bound=0)
  flags.DEFINE_string("workdir", "runs/paper", "Where results and the page with all of them are kept.")

  def run(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    parallel.setup()
    workdir, scale = Path(flags.FLAGS.workdir), flags.FLAGS.scale
    folder = workdir / Path(argv[0]).stem
    folder.mkdir(parents=True, exist_ok=True)
    settings = getattr(experiment, scale)._replace(seed=flags.FLAGS.seed)
    mpl.use("Agg")
    mpl.rcParams.update(STYLE)
    begun = time.perf_counter()
    finding = experiment.run(settings)
    seconds = time.perf_counter() - begun
    picture = io.BytesIO()
    finding.figure.savefig(picture, format="png", bbox_inches="tight")
    files.write_atomically(folder / "figure.png", picture.getvalue())
    result = {
      "number": experiment.number,
      "title": experiment.title,
      "paper_says": experiment.paper_says,
      "command": f"python {shlex.join(sys.argv)}",
      "scale": scale,
      "settings": settings._asdict(),
      "verdict": finding.verdict,
      "holds": bool(finding.holds),
      "table": [list(row) for row in finding.table],
      "remarks": finding.remarks,
      "seconds": round(seconds),
      "machine": f"{jax.device_count()} × {jax.devices()[0].device_kind}, JAX {jax.__version__}",
    }
    files.write_atomically(folder / "result.json", json.dumps(result, indent=2, default=str) + "\n")
    page = write_page(workdir)
    print(f"{finding.verdict}: {'as in the paper' if finding.holds else 'NOT as in the paper'}")
    print(f"{seconds:.0f} s. Figure: {folder / 'figure.png'}, page: {page}")
    sys.exit(0 if finding.holds else 1)

  command_line.run(run, errors=(ValueError,))


def write_page(workdir: Path) -> Path:
  """Renews `workdir`/index.html from the results in its folders."""
  results = {path.parent.name: json.loads(path.read_text("utf-8")) for path in workdir.glob("*/result.json")}
  ordered = sorted(results.items(), key=lambda item: item[1]["number"])
  summary = [
    f'<tr><td>{r["number"]}</td><td><a href="#{name}">{html.escape(r["title"])}</a></td>'
    f"<td>{html.escape(r['verdict'])}</td><td>{_mark(r['holds'])}</td><td>{r['seconds']}&nbsp;s</td></tr>"
    for name, r in ordered
  ]
  seen = sum(r["holds"] for _, r in ordered)
  count = f"<p>{len(ordered)} experiments, {seen} of them as in the paper.</p>"
  head = "<tr><th></th><th>experiment</th><th>measured</th><th>as in the paper</th><th>time</th></tr>"
  parts = [count, f"<table>{head}{''.join(summary)}</table>", *(_section(name, r) for name, r in ordered)]
  path = workdir / "index.html"
  files.write_atomically(path, _PAGE.replace("CONTENT", "\n".join(parts)))
  return path


def _section(name: str, r: Mapping[str, Any]) -> str:
  settings = ", ".join(f"{key} = {value}" for key, value in r["settings"].items())
  header, *rows = r["table"]
  cells = lambda row, tag: "".join(f"<{tag}>{html.escape(str(x))}</{tag}>" for x in row)
  table = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
  remarks = f"<p><b>Remarks.</b> {html.escape(r['remarks'])}</p>" if r["remarks"] else ""
  scale = f"scale: {r['scale']}; {r['seconds']} s on {r['machine']}"
  return f"""<h2 id="{name}">{r["number"]}. {html.escape(r["title"])}</h2>
<p><b>The paper says.</b> {html.escape(r["paper_says"])}</p>
<p><b>Measured here.</b> {html.escape(r["verdict"])}. As in the paper: {_mark(r["holds"])}.</p>
<img src="{name}/figure.png" alt="{html.escape(r["title"])}">
<table><tr>{cells(header, "th")}</tr>{table}</table>
{remarks}
<p class="small"><code>{html.escape(r["command"])}</code> ({html.escape(scale)})<br>
{html.escape(settings)}</p>"""


def _mark(holds: bool) -> str:
  return '<span class="yes">yes</span>' if holds else '<span class="no">no</span>'


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>The experiments of the PES paper</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { text-align: left; padding: .25em .8em .25em 0;
border-bottom: 1px solid #ddd; vertical-align: top } img { max-width: 100% } .small { font-size: .85em; color: #555 }
.yes { color: #2a7d2a; font-weight: bold } .no { color: #c22; font-weight: bold } h2 { margin-top: 2.5em }
</style>
<h1>The experiments of the PES paper</h1>
<p>Vicol, Metz and Sohl-Dickstein, <a href="https://arxiv.org/abs/2112.13835">Unbiased Gradient Estimation in Unrolled
Computation Graphs with Persistent Evolution Strategies</a>, ICML 2021, run with lopt. ± is one standard error over
seeds.</p>
CONTENT
</html>
"""
