import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import jax
import ml_collections
import numpy as np
import pytest

from lopt import configuration
from lopt.configuration import ConfigError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "experiments/configs").glob("*.py"))


def build(
  problem: Any,
  *,
  width: int = 32,
  sigma: float = 0.5,
  clip: float | None = None,
  sizes: tuple[int, ...] = (4, 4),
  bounds: tuple[float, float] = (0.0, 1.0),
  mode: Literal["fast", "exact"] = "fast",
  name_of_data: str = "digits",
  stagger: bool = True,
) -> dict[str, Any]:
  if width < 1:
    raise ValueError(f"width: must be at least 1, not {width}")
  return dict(locals())


def test_defaults_are_the_keyword_only_arguments():
  assert configuration.defaults(build) == {
    "width": 32,
    "sigma": 0.5,
    "clip": None,
    "sizes": (4, 4),
    "bounds": (0.0, 1.0),
    "mode": "fast",
    "name_of_data": "digits",
    "stagger": True,
  }


@pytest.mark.parametrize(
  ("name", "value", "converted"),
  [
    ("width", 3, 3),
    ("sigma", 2, 2.0),
    ("sigma", 0.1, 0.1),
    ("clip", 1, 1.0),
    ("clip", None, None),
    ("sizes", [1, 2, 3], (1, 2, 3)),
    ("sizes", (), ()),
    ("bounds", [1, 2], (1.0, 2.0)),
    ("mode", "exact", "exact"),
    ("stagger", False, False),
  ],
)
def test_values_of_the_annotated_type_are_passed_on(name, value, converted):
  result = configuration.call(build, {name: value}, "problem", where="config.x")
  assert result == {"problem": "problem", **configuration.defaults(build), name: converted}
  assert type(result[name]) is type(converted)
  if isinstance(converted, tuple):
    assert [type(item) for item in result[name]] == [type(item) for item in converted]


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("width", 1.5, "config.x.width: 1.5 is not an int"),
    ("width", True, "config.x.width: True is not an int"),
    ("width", "3", "config.x.width: '3' is not an int"),
    ("width", None, "config.x.width: None is not an int"),
    ("sigma", False, "config.x.sigma: False is not a float"),
    ("clip", "no", "config.x.clip: 'no' is not a float or None"),
    ("sizes", 4, "config.x.sizes: 4 is not a tuple[int, ...]"),
    ("sizes", (1, 2.5), "config.x.sizes: (1, 2.5) is not a tuple[int, ...]"),
    ("bounds", (1.0, 2.0, 3.0), "config.x.bounds: (1.0, 2.0, 3.0) is not a tuple[float, float]"),
    ("mode", "quick", "config.x.mode: 'quick' is not one of 'fast', 'exact'"),
    ("stagger", 1, "config.x.stagger: 1 is not a bool"),
    ("name_of_data", 7, "config.x.name_of_data: 7 is not a str"),
    (
      "widht",
      3,
      "config.x.widht: unknown field; did you mean 'width'? test_configuration.build takes: width, sigma, clip, "
      "sizes, bounds, mode, name_of_data, stagger",
    ),
    ("problem", 3, "config.x.problem: unknown field; test_configuration.build takes: width, "),
    ("width", 0, "config.x: width: must be at least 1, not 0"),
  ],
)
def test_a_bad_option_is_named(name, value, message):
  with pytest.raises(ConfigError) as error:
    configuration.call(build, {name: value}, None, where="config.x")
  assert str(error.value).startswith(message)
  assert "\n" not in str(error.value)


def test_the_error_of_a_section_within_is_not_prefixed_twice():
  def outer(*, section: Any):
    return configuration.call(build, section, None, where="config.section")

  with pytest.raises(ConfigError, match=r"^config\.section: width: must be at least 1, not 0$"):
    configuration.call(outer, {"section": {"width": 0}}, where="config")


def test_an_option_without_default_must_be_given():
  def build(*, width: int):
    return width

  assert configuration.call(build, {"width": 3}, where="x") == 3
  with pytest.raises(ConfigError, match=r"x\.width: missing"):
    configuration.call(build, {}, where="x")


@pytest.fixture
def my_project(tmp_path, monkeypatch):
  """A user's own modules, outside of lopt."""
  folder = tmp_path / "my_project"
  folder.mkdir()
  (folder / "my_task.py").write_text("def build(*, size: int = 2):\n  return ('task', size)\n")
  (folder / "my_estimator.py").write_text("def build(problem, *, k: int = 1):\n  return (problem, k)\n")
  (folder / "empty.py").write_text("")
  (folder / "broken.py").write_text("import a_package_that_is_not_installed\n")
  monkeypatch.syspath_prepend(tmp_path)
  return folder


def test_modules_of_lopt_and_of_the_user_are_built_by_name(my_project):
  assert configuration.build("tasks", {"name": "my_project.my_task", "size": 5}, where="t") == ("task", 5)
  section = ml_collections.ConfigDict({"name": "my_project.my_estimator", "k": 3})
  assert configuration.build("outer", section, "problem", where="e") == ("problem", 3)
  assert configuration.module("architectures", "mlp", where="a").__name__ == "lopt.architectures.mlp"


@pytest.mark.parametrize(
  ("section", "message"),
  [
    ({"name": "mpl"}, r"a\.name: no lopt/architectures/mpl\.py; did you mean 'mlp'\? there are: .*mlp"),
    ({"name": "my_projct.my_task"}, r"a\.name: no module 'my_projct\.my_task'; .* PYTHONPATH"),
    ({"name": "my_project.my_tsk"}, r"a\.name: no module 'my_project\.my_tsk'"),
    ({"name": "my_project.empty"}, r"a\.name: my_project\.empty has no function `build`"),
    ({"name": 3}, r"a\.name: 3 names no module; there are: .*mlp"),
    ({"hidden": 3}, r"a\.name: None names no module; there are: .*mlp"),
    ({"name": "my_project.my_task", "size": {1}}, r"a\.size: set \{1\} cannot be stored"),
  ],
)
def test_a_module_that_cannot_be_built_is_named(my_project, section, message):
  with pytest.raises(ConfigError, match=message) as error:
    configuration.build("architectures", section, where="a")
  assert "\n" not in str(error.value)


def test_an_import_error_inside_of_a_module_is_not_hidden(my_project):
  with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
    configuration.module("tasks", "my_project.broken", where="t")


def test_only_what_can_be_chosen_is_offered():
  offered = configuration.choices("outer")
  assert {"es", "pes"} <= set(offered)
  assert not {"parallel", "meta_training", "unrolls", "__init__"} & set(offered)
  with pytest.raises(ConfigError, match=f"there are: {', '.join(offered)};"):
    configuration.module("outer", "nothing", where="e")


def test_choose_fills_sections_with_defaults_and_values(my_project):
  task = {"my_project.my_task": {"size": 7}}
  config: Any = configuration.choose("", task=task, estimator={"my_project.my_estimator": {}, "pes": {"sigma": 3}})
  assert config.to_dict() == {
    "task": {"name": "my_project.my_task", "size": 7},
    "estimator": {"name": "my_project.my_estimator", "k": 1},
  }
  config = configuration.choose(
    "estimator=pes", task=task, estimator={"my_project.my_estimator": {}, "pes": {"sigma": 3}}
  )
  assert config.estimator.name == "pes"
  assert config.estimator.sigma == 3.0
  assert type(config.estimator.sigma) is float
  config = configuration.choose("estimator=es,task=my_project.my_task", task=task, estimator={"pes": {"sigma": 3}})
  assert config.estimator.sigma != 3
  for choices, message in [("estimtor=es", "estimtor=es: not a choice"), ("es", "es: not a choice")]:
    with pytest.raises(ConfigError, match=message):
      configuration.choose(choices, estimator={"pes": {}})
  with pytest.raises(ConfigError, match=r"estimator\.sgima: unknown field; did you mean 'sigma'"):
    configuration.choose("", estimator={"pes": {"sgima": 1.0}})


def test_plain_survives_json():
  config = ml_collections.ConfigDict({"a": {"b": (1, 2), "c": None, "d": "x", "e": 0.1, "f": True}})
  plain = configuration.plain(config)
  assert plain == {"a": {"b": [1, 2], "c": None, "d": "x", "e": 0.1, "f": True}}
  assert json.loads(json.dumps(plain)) == plain
  assert configuration.difference(json.loads(json.dumps(plain)), config) == []
  with pytest.raises(ConfigError, match=r"config\.a\.b\[1\]: bytes b'x' cannot be stored"):
    configuration.plain({"a": {"b": [1, b"x"]}})


def test_difference_names_the_fields():
  there = {"estimator": {"sigma": 0.01, "k": 1, "sizes": [1, 2]}, "seed": 0}
  here = {"estimator": {"sigma": 0.02, "k": 1, "sizes": (1, 3), "new": None}}
  assert configuration.difference(there, here) == [
    "estimator.sigma: 0.01 (there) != 0.02 (here)",
    "estimator.sizes: [1, 2] (there) != [1, 3] (here)",
    "seed: 0 (there) != absent (here)",
    "estimator.new: absent (there) != None (here)",
  ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files_are_complete_and_fit_their_modules(path):
  config = configuration.load(path).get_config()
  digits = configuration.load(ROOT / "experiments/configs/digits.py").get_config()
  assert set(config) == set(digits)
  for section, package in configuration.PACKAGES.items():
    options = configuration.plain(config[section])
    if options["name"] == configuration.MIXTURE:
      assert options["families"]
      continue
    function = configuration.module(package, options.pop("name"), where=section).build
    for wrapper in configuration.WRAPPERS.get(package, ()):
      options.pop(wrapper, None)
    assert options.keys() == configuration.defaults(function).keys()
  assert f"--config=experiments/configs/{path.name}" in (configuration.load(path).__doc__ or "")


def test_every_choice_can_be_made_in_digits():
  get_config = configuration.load(ROOT / "experiments/configs/digits.py").get_config
  for section, package in configuration.PACKAGES.items():
    for name in configuration.choices(package):
      assert get_config(f"{section}={name}")[section].name == name


@pytest.fixture(scope="module")
def script(tmp_path_factory):
  """A program like experiments/meta_train.py, which prints its configuration."""
  path = tmp_path_factory.mktemp("script") / "script.py"
  path.write_text(
    textwrap.dedent("""
      import json
      from absl import flags
      from lopt import command_line, configuration

      command_line.define_flag("config", "experiments/configs/digits.py", "What to run.")

      def main(argv):
        print(json.dumps(configuration.plain(flags.FLAGS.config)))

      command_line.run(main, name="script.py", again="")
    """)
  )
  return path


def run(script: Path, *flags: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, script, *flags], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
  )


DIGITS = "--config=experiments/configs/digits.py"


@pytest.mark.parametrize(
  ("command", "line"),
  [
    ("paper/run_all.py stray", "run_all.py: unexpected argument: stray"),
    ("paper/yacht.py --seed=-1", "yacht.py: flag --seed=-1: -1 is not a non-negative integer"),
    ("benchmarks/scaling.py --only=none", "scaling.py: --only: 'none' is in no case; there are: "),
    ("benchmarks/lengths.py --rates=high", "lengths.py: could not convert string to float: 'high'"),
    ("robustness/kill.py --kills=none", "kill.py: flag --kills=none: "),
  ],
)
def test_every_script_answers_a_bad_flag_in_one_line(command, line):
  script, *flags = command.split()
  result = run(ROOT / "experiments" / script, *flags)
  assert result.returncode == 1
  (said,) = result.stderr.splitlines()
  assert said.startswith(line)


def test_every_option_is_a_flag(script):
  result = run(
    script,
    f"{DIGITS}:architecture=lstm,estimator=es",
    "--config.estimator.sigma=2",
    "--config.estimator.unroll_length=7",  # None by default
    "--noconfig.estimator.stagger",
    "--config.architecture.hidden_sizes=(4, 5)",
    "--config.seed=12",
  )
  assert result.returncode == 0, result.stderr
  config = json.loads(result.stdout)
  assert (
    config["estimator"] | {"name": "es", "sigma": 2.0, "unroll_length": 7, "stagger": False} == config["estimator"]
  )
  assert config["architecture"]["name"] == "lstm"
  assert config["architecture"]["hidden_sizes"] == [4, 5]
  assert config["seed"] == 12


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([f"{DIGITS}:estimator=ess"], "estimator=ess: no lopt/outer/ess.py; did you mean 'es'? there are: "),
    ([DIGITS, "--config.taks.dataset=mnist"], "no such field: 'taks' Did you mean \"task\""),
    (
      [DIGITS, "--config.estimator.num_pairs=1.5"],
      "flag --config.estimator.num_pairs=1.5: invalid literal for int",
    ),
    ([DIGITS, "--config.task.datset=mnist"], "no such field: 'datset' Did you mean \"dataset\""),
    (["--config.taks.dataset=mnist"], "no such field: 'taks' Did you mean \"task\""),
    (["--config.estimator.sigma=x"], "flag --config.estimator.sigma=x: could not convert string to float: 'x'"),
    (["--config=nowhere.py"], "No such file or directory: 'nowhere.py'"),
  ],
)
def test_a_wrong_flag_is_one_line(script, flags, message):
  result = run(script, *flags)
  assert result.returncode != 0
  assert message in result.stderr
  assert len(result.stderr.splitlines()) == 1


def test_a_section_within_wraps_what_is_built():
  section = {"name": "quadratic", "dimension": 3}
  plain, wrapped = (
    configuration.build("tasks", section | more, where="config.task")
    for more in ({}, {"augmentation": {"init_scale": [5.0, 5.0]}})
  )
  key = jax.random.key(0)
  a, b = (family.init(key, family.sample(key)) for family in (plain, wrapped))
  np.testing.assert_allclose(np.linalg.norm(b) / np.linalg.norm(a), 5.0, rtol=0.5)
  with pytest.raises(
    ConfigError, match=r"config\.task\.augmentation\.init_scales: unknown field; did you mean 'init_scale'"
  ):
    configuration.build("tasks", section | {"augmentation": {"init_scales": 1.0}}, where="config.task")
  with pytest.raises(ConfigError, match=r"config\.task\.augmentation: 3 is not a section"):
    configuration.build("tasks", section | {"augmentation": 3}, where="config.task")
  chosen = configuration.choose("", task={"quadratic": {"augmentation": {"init_scale": (1.0, 2.0)}}})
  options = configuration.plain(chosen)["task"]["augmentation"]
  assert options["init_scale"] == [1.0, 2.0]
  assert options["gradient_noise"] is None
  assert "augmentation" not in configuration.plain(configuration.choose("", task={"quadratic": {}}))["task"]


def test_an_empty_section_is_a_wrapper_with_its_defaults():
  """Until now it was none, without a word."""
  for within, wrapped in (({"direction": {}}, True), ({"direction": None}, False), ({}, False)):
    section = {"name": "tensor_mlp", **within}
    assert (configuration.build("architectures", section, where="a").direction is not None) == wrapped
    assert (
      "learning_rate" in configuration.complete("architectures", section, where="a").get("direction", {})
    ) == wrapped


def test_a_mixture_is_its_families():
  section = {
    "name": "mixture",
    "families": {"small": {"name": "quadratic", "dimension": 2, "weight": 3}, "large": {"name": "quadratic"}},
  }
  families = configuration.task_families(section, where="config.task")
  assert {name: weight for name, (_, weight) in families.items()} == {"small": 3.0, "large": 1.0}
  key = jax.random.key(0)
  assert [len(family.init(key, family.sample(key))) for family, _ in families.values()] == [2, 10]
  ((name, (_, weight)),) = configuration.task_families({"name": "quadratic"}, where="config.task").items()
  assert (name, weight) == ("quadratic", 1.0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"families": {}}, "config.task.families: needs one section or more"),
    ({"families": {"a": 3}}, "config.task.families: needs one section or more"),
    ({"weights": 1}, "config.task.weights: unknown field; a mixture takes: families"),
    (
      {"families": {"a": {"name": "quadratic", "weight": 0}}},
      "config.task.families.a.weight: must be a number above 0",
    ),
    ({"families": {"a": {"name": "quadratics"}}}, "config.task.families.a.name: no lopt/tasks/quadratics.py"),
  ],
)
def test_what_is_wrong_with_a_mixture_is_said(change, message):
  section = {"name": "mixture", "families": {"a": {"name": "quadratic"}}, **change}
  with pytest.raises(ConfigError, match=message):
    configuration.task_families(section, where="config.task")


def test_names_from_files_import_only_what_is_allowed(tmp_path, monkeypatch):
  """As where a trained optimizer's own configuration says on which tasks to evaluate it."""
  mark = tmp_path / "imported"
  code = f"open({str(mark)!r}, 'w').close()\nfrom lopt.tasks.quadratic import build\n"
  (tmp_path / "foreign_task.py").write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "task.py").write_text("from foreign_task import build\n")
  one = {"name": "folder.task"}
  mixture = {"name": "mixture", "families": {"a": {"name": "quadratic"}, "b": one}}
  for section, where in [(one, "task"), (mixture, r"task\.families\.b")]:
    with pytest.raises(ConfigError, match=rf"{where}\.name: 'folder\.task' is not one of lopt's own \(.*quadratic"):
      configuration.task_families(section, where="task", modules=())
  for name in ("prepare", "datasets"):  # lopt's, and no task family
    with pytest.raises(ConfigError, match=rf"no lopt/tasks/{name}\.py"):
      configuration.task_families({"name": name}, where="task", modules=())
  assert not mark.exists()
  assert set(configuration.task_families(mixture, where="task", modules=["folder.task"])) == {"a", "b"}
  assert mark.exists()
