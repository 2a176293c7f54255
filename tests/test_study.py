"""Every member of the norm study composes, builds, and differs from its model in what it says."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_config import CONF, SMALL, build, composed

from gannorm.models.norm_factory import NORMS
from gannorm.study.members import EVALUATIONS, LOSS, STEPS, members, register
from gannorm.tasks import build_task
from gannorm.training.checkpoint import flat

register()
MEMBERS = members()


def test_members_are_every_norm_a_task_takes_and_the_mistakes():
    found = [(m.model, m.norm, m.batch_size) for m in MEMBERS.values() if not m.mistake]
    assert len(found) == len(set(found)) == 17
    plain = {name for name, norm in NORMS.items() if norm.unconditional is None}
    for model, norms, sizes in (
        ("cyclegan", plain, {1, 16}), ("resblock_gan", NORMS, {16}),
    ):  # fmt: skip
        mine = {(norm, size) for name, norm, size in found if name == model}
        assert mine == {(norm, size) for norm in norms for size in sizes}
    mistakes = {m.mistake: m for m in MEMBERS.values() if m.mistake}
    assert set(mistakes) == {"gamma_0", "moving_var_0"} and len(MEMBERS) == 19
    assert {m.norm for m in mistakes.values()} == {"conditional_batch"}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_is_not_refused_and_changes_no_more_than_it_says(name: str):
    member = MEMBERS[name]
    raw = composed(f"study={name}")
    loss = LOSS[member.model]
    own = composed(f"model={member.model}", f"norm={member.norm}", f"loss={loss}")
    plain, ours = (flat(OmegaConf.to_container(cfg)) for cfg in (own, raw))
    differing = {key: ours[key] for key in plain if ours[key] != plain[key]}
    steps = STEPS[member.model, member.batch_size]
    may = {
        "data.batch_size": member.batch_size, "trainer.steps": steps,
        "trainer.eval_every": steps // EVALUATIONS[member.model],
        **{f"norm.{key}": value for key, value in member.norm_keys.items()},
    }  # fmt: skip
    assert ours.keys() == plain.keys() and differing.items() <= may.items()
    assert {key: ours[key] for key in may} == may
    assert steps % EVALUATIONS[member.model] == 0
    build(composed(f"study={name}", *(SMALL if member.model == "resblock_gan" else [])))


def test_run_folders_and_the_command_line_wins():
    name = "cyclegan-layer-16"
    changes = [f"study={name}", "seed=2", "trainer.steps=3", "data.batch_size=4"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", changes, return_hydra_config=True)
    assert cfg.hydra.sweep.subdir == f"norm_study/{name}/seed_2"
    assert cfg.hydra.run.dir == f"outputs/norm_study/{name}/seed_2"
    assert (cfg.trainer.steps, cfg.data.batch_size, cfg.norm.name) == (3, 4, "layer")


def test_the_mistakes_are_the_tutorials():
    """Gamma 0: every image the same; moving variance 0: too much gain, where nothing moved it."""
    noise, labels = torch.randn(4, 32), torch.arange(4)
    outs = {}
    for name in ("", "-gamma_0", "-moving_var_0"):
        raw = composed(
            f"study=resblock_gan-conditional_batch-16{name}", "model.g_widths=[8,8,8,8]", *SMALL
        )
        torch.manual_seed(0)
        task = build_task(build(raw), torch.device("cpu"), 10)
        with torch.no_grad():
            outs[name] = task.generators["G"].eval()(noise, labels)
    assert outs["-gamma_0"].std(0).max() == 0
    assert outs["-moving_var_0"].abs().mean() > 0.9 > outs[""].abs().mean()
