"""The numbers behind every part of a report, as frozen records."""

from __future__ import annotations

from tuner.report.data._answer import (
    ClassRecall,
    Difference,
    Estimate,
    RecallData,
    VerdictData,
    VerdictRow,
    recall_data,
    verdict_data,
)
from tuner.report.data._confirmed import (
    ConfirmedData,
    ConfirmedRecipe,
    Repeated,
    confirmed_data,
)
from tuner.report.data._ladder import Comparison, LadderData, RungRow, Twin, ladder_data
from tuner.report.data._moment import still
from tuner.report.data._overview import (
    BestRecipe,
    FloorData,
    GroupSize,
    OverviewData,
    Setting,
    overview_data,
)
from tuner.report.data._pruning import Control, PruningData, Training, pruning_data
from tuner.report.data._search import (
    HeadTailData,
    HistoryData,
    LossData,
    LossRow,
    Point,
    Tradeoff,
    head_tail_data,
    history_data,
    loss_data,
)

__all__ = [
    "BestRecipe",
    "ClassRecall",
    "Comparison",
    "ConfirmedData",
    "ConfirmedRecipe",
    "Control",
    "Difference",
    "Estimate",
    "FloorData",
    "GroupSize",
    "HeadTailData",
    "HistoryData",
    "LadderData",
    "LossData",
    "LossRow",
    "OverviewData",
    "Point",
    "PruningData",
    "RecallData",
    "Repeated",
    "RungRow",
    "Setting",
    "Tradeoff",
    "Training",
    "Twin",
    "VerdictData",
    "VerdictRow",
    "confirmed_data",
    "head_tail_data",
    "history_data",
    "ladder_data",
    "loss_data",
    "overview_data",
    "pruning_data",
    "recall_data",
    "still",
    "verdict_data",
]
