"""CLIP-CISS: a query per class from its name, masks from attention, and the past held by distillation alone.

"CLIP-Guided Class Incremental Semantic Segmentation with Generalization-Preserving Knowledge Distillation". An image
encoder and a decoder without a number of classes: a new class is one more row of text. Only the classes of the present
task get losses from labels. Old ones move through shared weights alone, and are held by how image regions lie relative
to class texts (GPD) and by their decoded queries (QD). There is no background class: every class tells by itself
whether it is in the image (CACP), so nothing changes its meaning when background does.

A class that comes back with labels in a later task (partial labels) learns from them like a new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from perdure.data.case import Batch
from perdure.engine.phases import Phase, Terms
from perdure.errors import DataError, UsageError
from perdure.kept.items import Kept
from perdure.methods import training
from perdure.methods.clip_ciss.gpd import global_loss, relation_loss
from perdure.methods.clip_ciss.options import ClipCissOptions
from perdure.methods.clip_ciss.regions import Regions, believed, labelled
from perdure.methods.clip_ciss.terms import mask_losses, masks_per_process, presence_loss, query_distillation
from perdure.methods.losses import channels_of
from perdure.methods.method import Method
from perdure.methods.options import Setup
from perdure.methods.prediction import Prediction
from perdure.networks.clip.decoder import presence
from perdure.networks.clip.encoder import ClipEncoder, EncoderOutput, MapsEncoder
from perdure.networks.clip.names import check_names, class_names
from perdure.networks.clip.segmenter import ClipSegmenter, Segmented
from perdure.networks.clip.text import HASH, TextTable, text_table
from perdure.networks.frozen import Frozen
from perdure.networks.segmenter import padded, upsample
from perdure.streams.task import Task


class ClipCiss(Method[ClipCissOptions]):
    """Text-conditioned segmentation with distillation.

    The text table is a buffer ``text (C, D)``, a row per class in learning order: whatever the order of the classes,
    each has the row of its own name. It is sealed with the run, so predicting needs no text encoder. The hash of
    what read the names is sealed with it (``text_source (32,)`` uint8, zero for the stand-in).

    Attributes:
        names: Of the classes seen so far, by id.
        known: Number of classes of earlier tasks; they come first.
        learning: Positions, among the classes seen so far, of those that the task's labels show.
        held: Positions of old classes that they do not show.
        preserving: Whether GPD has anything to hold: it compares encoders, and a frozen one stays as it is.
    """

    Options = ClipCissOptions
    reads_names = True
    text: Tensor
    text_source: Tensor
    named: Tensor

    def __init__(self, setup: Setup[ClipCissOptions]) -> None:
        super().__init__(setup)
        self.network, self.weights = setup.network(ClipSegmenter), setup.weights
        self.names: dict[int, str] = {}
        self.known = 0
        self.learning: list[int] = []
        self.held: list[int] = []
        self.preserving = False
        self.previous: Frozen[ClipSegmenter] | None = None
        self.pretrained: Frozen[MapsEncoder] | None = None
        self.register_buffer("text", torch.zeros(0, self.network.dim))
        self.register_buffer("text_source", torch.zeros(32, dtype=torch.uint8))
        self.register_buffer("named", torch.zeros(0, self.network.dim), persistent=False)

    def begin(self, task: Task) -> None:
        """Freeze a copy of what is to be preserved: the pretrained encoder, later the model as it was."""
        self.names = {c: task.space.name(c) for c in task.seen}
        check_names(list(self.names.values()))
        self.class_ids, self.known = task.seen, len(task.old)
        self.learning = [k for k, c in enumerate(task.seen) if c in task.annotated]
        self.held = [k for k, c in enumerate(task.old) if c not in task.annotated]
        self.text, self.named = self.text[: self.known], self.named[:0]
        self.preserving = self.options.gpd > 0 and any(p.requires_grad for p in self.network.encoder.parameters())
        first = self.preserving and task.index == 0 and self._knows_text()
        self.pretrained = Frozen(self.network.encoder) if first else None
        self.previous = Frozen(self.network) if (self.preserving or self.options.qd) and task.index else None
        if task.index and self.training_options.freeze_norm:
            self.network.freeze_norm()

    def phases(self, task: Task) -> Sequence[Phase]:
        """One training phase, once the names of the new classes are read."""
        if not len(self.text):  # a name that cannot be read is told before anything is trained, whatever its task
            self._read({c: task.space.name(c) for c in task.space.ids})
        self._complete_text()
        return [training.train_phase(self, self.network, task, self.training_options, self.loss)]

    def _knows_text(self) -> bool:
        """Whether the encoder comes with a joint space of images and texts that training should not destroy."""
        return self.network.weights.source != "random" and not self.network.encoder.fresh

    def _complete_text(self) -> None:
        """Read the names of classes that have no row yet.

        Not in ``begin``: where a sealed task is restored its rows come with it, and the text encoder may be elsewhere.
        """
        if missing := {c: self.names[c] for c in self.class_ids[len(self.text) :]}:
            self.text = torch.cat([self.text, self._read(missing).to(self.text)])

    def _read(self, names: Mapping[int, str]) -> Tensor:
        """Rows ``(N, D)`` of classes, by id, with the names that the data gives them, or that the recipe does."""
        options, words = self.options, list(names.values())
        if options.names is not None:
            listed = class_names(options.names)
            if max(names) > len(listed):
                raise UsageError(
                    f"method.names={options.names} has {len(listed)} names, the data set a class {max(names)}",
                    "give one name per class, in the order of their ids",
                )
            words = [listed[c - 1] for c in names]
        source = options.text
        if source == "auto":  # not what the network loaded: a restored one loads nothing, whatever read its names
            by_clip = isinstance(self.network.encoder, ClipEncoder) and self.weights != "random"
            source = self.weights if by_clip else HASH
        table = text_table(
            words, source, dim=self.network.dim, templates=options.prompts, vocabulary=options.vocabulary
        )
        self._same_source(table)
        return table.vectors

    def _same_source(self, table: TextTable) -> None:
        """Remember what read the first names; refuse another reader later, whose vectors lie in another space.

        Raises:
            DataError: Weights, description or vocabulary are not what they were, though they have the same names.
        """
        digest = torch.frombuffer(bytearray.fromhex(table.reader), dtype=torch.uint8)
        if len(self.text) and not torch.equal(self.text_source.cpu(), digest):
            raise DataError(
                f"{table.weights.source} is not the text encoder that read the names of earlier classes",
                "bring back weights, description and vocabulary of the run: vectors of two encoders cannot be compared",
            )
        self.text_source.copy_(digest)

    # The losses -----------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Terms:
        """3.6: what the labels say of this task's classes, and how far old knowledge has moved."""
        options = self.options
        said = self.network(batch.images, self.text)
        regions = labelled(batch.labels, self.class_ids)
        terms = self._current(said, regions, batch)
        if self.previous is not None:
            teacher = self.previous.module
            with torch.no_grad():
                before: Segmented = teacher(batch.images, self.text[: self.known])
            if self.preserving:
                terms["gpd"] = options.gpd * self._preserve(
                    said.encoded, before.encoded, self._with_pseudo_masks(regions, before, batch.labels)
                )
            if options.qd:
                queries, old_queries = (part.decoded.queries[:, :, self.held] for part in (said, before))
                terms["qd"] = options.qd * query_distillation(queries, old_queries)
        elif self.pretrained is not None:
            with torch.no_grad():
                encoded: EncoderOutput = self.pretrained.module(batch.images)
            terms["gpd"] = options.gpd * self._preserve(said.encoded, encoded, regions)
        return terms

    def _current(self, said: Segmented, regions: Regions, batch: Batch) -> Terms:
        """3.1 and 3.2: is a class there, and where; of the classes that the labels show."""
        options, learning = self.options, self.learning
        terms: Terms = {}
        if options.presence:
            shown = torch.zeros(said.presence.shape[:2], dtype=torch.bool, device=batch.labels.device)
            shown[regions.images, regions.columns] = True
            told = None if batch.annotated is None else batch.annotated[:, [self.class_ids[k] for k in learning]]
            confidence = presence_loss(said.presence[:, learning], shown[:, learning], told)
            terms["presence"] = options.lambda_presence * confidence
        focal, dice = mask_losses(said.decoded.masks, regions, masks_per_process(regions))
        return terms | {"focal": options.lambda_focal * focal, "dice": options.lambda_dice * dice}

    def _preserve(self, now: EncoderOutput, before: EncoderOutput, regions: Regions) -> Tensor:
        """3.4: GPD of regions and of whole images, relative to the texts of all classes seen so far, new ones too.

        The published code leaves out the images' part where no image of a batch has a region; this is mended.
        """
        relations = relation_loss(now.dense, before.dense, self.text, regions, self.options.gpd_chunk)
        return relations + global_loss(now.cls, before.cls, self.text, self.options.gpd_temperature)

    def _with_pseudo_masks(self, regions: Regions, before: Segmented, labels: Tensor) -> Regions:
        """Labelled regions, and those of old classes that the previous model is sure of (3.5)."""
        taken = channels_of(labels, self.class_ids) >= 0
        likely, masks = self._presence(before)[:, self.held], before.decoded.masks[-1][:, self.held]
        more = believed(likely, masks, taken, self.options.pseudo_threshold)
        columns = torch.tensor(self.held, dtype=torch.int64, device=labels.device)
        return regions.joined(more._replace(columns=columns[more.columns]))

    def _presence(self, said: Segmented) -> Tensor:
        """Probability ``(B, C)`` that a class is in the image; 1 where that is not asked."""
        chances = presence(said.presence)
        return chances if self.options.presence else torch.ones_like(chances)

    # The finished model ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """``P(present) sigmoid(mask)`` of each class (2.6), beside a constant for background if the options say so.

        The decoder runs for all classes at once, for they attend to each other; its maps are small. They are upsampled
        a few classes at a time, when their scores are asked for.
        """
        if not len(self.named):
            self._complete_text()  # only of a model that was never trained
        whole = padded(images, [self.network.stride] * 2)
        said = self.network(whole, torch.cat([self.text, self.named]))
        likely, masks = self._presence(said), said.decoded.masks[-1]

        @torch.no_grad()
        def score(channels: Sequence[int]) -> Tensor:
            wanted = list(channels)
            full = upsample(masks[:, wanted], whole.shape[2:])[..., : images.shape[2], : images.shape[3]]
            return full.sigmoid() * likely[:, wanted, None, None]

        ids, held = self.class_ids, masks.nbytes + likely.nbytes
        if self.options.background == "none":
            return Prediction(ids, score, held_bytes=held)
        return training.beside_background(ids, score, self.options.background_threshold, held)

    def add_names(self, names: Mapping[int, str]) -> None:
        """Predict these classes too, by id, from their names alone; forgotten when the next task begins."""
        check_names([*self.names.values(), *names.values()])
        self._complete_text()
        self.named = torch.cat([self.named, self._read(names).to(self.text)])
        self.class_ids += tuple(names)

    def kept(self) -> Sequence[Kept]:
        """The text table, 4 D bytes per class, and the hash of what read the names."""
        text = f"a text vector of the name of each class, in the prompt '{self.options.prompts[0]}'; from no image"
        source = "the hash of the text encoder that read the names of the classes, zero for the stand-in; from no image"
        return [
            Kept("text", "prototypes", ("text",), text, per_class=True),
            Kept("text-source", "statistics", ("text_source",), source),
        ]
