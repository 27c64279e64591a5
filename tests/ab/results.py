"""Made-up measurements of a comparison."""

from opacus_bpclip.ab.results import ArmResult, ComparisonRecord, EpochResult, Plan, SeedResult
from opacus_bpclip.ab.settings import ARMS, NON_PRIVATE, Settings

SETTINGS = Settings(epochs=2, seeds=(0, 1), threads=1)
PLAN = Plan(
    sample_rate=1 / 12,
    steps_per_epoch=12,
    noise_multiplier=2.0166015625,
    epsilons=(0.7, 2.998),
    parameters=9258,
    train_examples=1437,
    test_examples=360,
)


def seed_result(seed, private, final, memory=10 * 2**20):
    epochs = tuple(
        EpochResult(epoch, epsilon if private else None, accuracy, loss)
        for epoch, epsilon, accuracy, loss in [(1, 0.7, 0.5, 1.5), (2, 2.998, final, None)]
    )
    epsilon = 2.998 if private else None
    peak = None if memory is None else memory + seed * 2**20
    return SeedResult(seed, epochs, epsilon, 0.004 + seed / 1000, peak)


def arm_result(arm, memory=10 * 2**20):
    private = arm != NON_PRIVATE
    seeds = (seed_result(0, private, 0.875, memory), seed_result(1, private, 0.9, memory))
    return ArmResult(arm=arm, max_input_norm=SETTINGS.input_norm(arm), seeds=seeds)


def finished(arms=ARMS, plan=PLAN, memory=10 * 2**20, **changes):
    record = ComparisonRecord.new(SETTINGS.replace(arms=arms, **changes), plan=plan)
    for arm in arms:
        record = record.with_result(arm_result(arm, memory))
    return record
