"""Evaluation: how good the answers are, and what is left of the score when the mask is taken away.

    python eval.py --model out/final --data test.json                            # exact match and loss, by type of question
    python eval.py --model out/final --data test.json --control full shuffle     # the same beside what the mask did not earn
    python eval.py --model out/final --data test.json --out scores               # predictions.jsonl and scores.json

Every answer of a conversation is one question: the model reads the conversation up to it and answers greedily. A control asks the
same questions with every mask replaced by the whole frame (full), or by the mask of another sample's object (shuffle).
"""

import argparse
import json
import os
from collections import Counter, defaultdict
from functools import partial

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model as models
from train import write_whole


def load(path, device):
    """A folder that train.py wrote, or a plain backbone -> (model, processor). What training saw of a video, the model sees."""
    saved = os.path.join(path, "nanorefer.json")
    settings = data.Settings(frame_pixels=384 * 384, region_pixels=384 * 384)
    if os.path.exists(saved):
        with open(saved) as file:
            settings = data.Settings(**json.load(file))
    processor = data.Processor.from_pretrained(path, settings)
    return models.ReferringVideoLLM.from_pretrained(path, processor.region_token_id).to(device).eval(), processor


class Questions(data.ReferringDataset):
    """The same samples, one answer at a time: keys are (number, turn) pairs."""

    def __getitem__(self, key):
        try:
            return self.question(*key)
        except data.DataError as error:
            return error


def collate(samples, **options):
    """A batch, or the first DataError among the samples: raised here, in a worker, it would lose its shape."""
    errors = [s for s in samples if isinstance(s, data.DataError)]
    return errors[0] if errors else data.collate(samples, **options)


def batches(dataset, keys, args, **options):
    """Batches of dataset[key] on the device, in order, with a progress bar. A sample that cannot be used ends the evaluation."""
    joined = partial(collate, pad_token_id=dataset.processor.tokenizer.pad_token_id, **options)
    loader = DataLoader(dataset, args.batch_size, sampler=keys, collate_fn=joined, num_workers=args.workers)
    for batch in tqdm(loader, unit="batch", leave=False):
        if isinstance(batch, data.DataError):
            raise batch
        yield {name: value.to(args.device) if torch.is_tensor(value) else value for name, value in batch.items()}


def predict(model, processor, samples, keys, control, args):
    """-> the model's answer to each (number, turn), as text."""
    answers = []
    for batch in batches(Questions(samples, processor, control=control), keys, args, pad_left=True):
        tokens = model.generate(batch, processor.tokenizer.eos_token_id, args.max_new_tokens)
        answers += [processor.tokenizer.decode(t, skip_special_tokens=True).strip() for t in tokens]
    return answers


@torch.no_grad()
def mean_loss(model, processor, samples, args):
    """Cross-entropy of the right answers: a sum over all supervised tokens, divided once by their number."""
    total, tokens = 0.0, 0
    for batch in batches(data.ReferringDataset(samples, processor), [(0, i) for i in range(len(samples))], args):
        total += model(batch).item()
        tokens += int((batch["labels"][:, 1:] != data.IGNORE).sum())
    return total / tokens


def table_rows(questions):
    """{row: numbers of its questions}: each type, then all questions about regions, then all questions."""
    rows = defaultdict(list)
    for i, question in enumerate(questions):
        rows[question["type"] or "(no type)"].append(i)
    rows = dict(sorted(rows.items()))
    rows["about regions"] = [i for i, question in enumerate(questions) if question["regions"]]
    rows["all"] = list(range(len(questions)))
    return {name: members for name, members in rows.items() if members}


def report(questions, columns, rows, loss, out):
    """Prints the table: a row a type of question; its questions, the share answered exactly (up to white space at the ends), the
    same under each control, and the share that the best constant answer to each type would get. Writes it all to out, if given.

    columns: {"exact" or a control: {number of the question: prediction}}; a control has no entry where there is no region.
    """
    scores = {"loss": loss, "rows": {}}
    print(f"{'':16}{'questions':>10}" + "".join(f"{name:>10}" for name in columns) + f"{'constant':>10}")
    for row, members in rows.items():
        counts = {"questions": len(members)}
        for name, predictions in columns.items():
            asked = [i for i in members if i in predictions]
            counts[name] = {"right": sum(predictions[i] == questions[i]["answer"] for i in asked), "asked": len(asked)}
        answers = defaultdict(Counter)  # type -> how often each answer is the right one
        for i in members:
            answers[questions[i]["type"]][questions[i]["answer"]] += 1
        counts["constant"] = sum(counter.most_common(1)[0][1] for counter in answers.values())
        scores["rows"][row] = counts
        shares = [f"{100 * c['right'] / c['asked']:.1f} %" if c["asked"] else "-" for c in (counts[name] for name in columns)]
        shares.append(f"{100 * counts['constant'] / len(members):.1f} %")
        print(f"{row:16}{len(members):>10}" + "".join(f"{share:>10}" for share in shares))
    print(f"loss {loss:.4f} per supervised token")
    if out:

        def write(folder):
            with open(os.path.join(folder, "predictions.jsonl"), "w") as file:
                for i, question in enumerate(questions):
                    line = question | {name: predictions[i] for name, predictions in columns.items() if i in predictions}
                    file.write(json.dumps(line) + "\n")
            with open(os.path.join(folder, "scores.json"), "w") as file:
                json.dump(scores, file, indent=2)

        write_whole(out, write)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that train.py wrote (OUT/final), or a pretrained backbone")
    parser.add_argument("--data", nargs="+", required=True, help="data files: JSON arrays or JSONL")
    parser.add_argument("--media", help="folder that media paths are relative to (default: each data file's own)")
    parser.add_argument("--control", nargs="+", choices=("full", "shuffle"), default=[], help="ask again with the masks replaced")
    parser.add_argument("--out", help="a new folder for predictions.jsonl and scores.json")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.out and os.path.exists(args.out):
        raise SystemExit(f"--out {args.out}: exists already; name another folder, or remove it")

    samples = data.read_samples(args.data, args.media)
    model, processor = load(args.model, args.device)
    turns, questions = [], []
    for number in range(len(samples)):
        sample = samples[number]
        for turn, (question, answer) in enumerate(sample.turns):
            turns.append((number, turn))
            pointed = any(data.REGION_TAG in earlier for earlier, _ in sample.turns[: turn + 1])
            asked = {"id": sample.id, "turn": turn, "type": sample.type, "regions": pointed}
            questions.append(asked | {"question": question, "answer": answer.strip()})

    rows = table_rows(questions)
    loss = mean_loss(model, processor, samples, args)
    columns = {}
    for name, control in [("exact", "none"), *((name, name) for name in args.control)]:
        members = [i for i, question in enumerate(questions) if question["regions"] or control == "none"]
        found = predict(model, processor, samples, [turns[i] for i in members], control, args)
        columns[name] = dict(zip(members, found))
    report(questions, columns, rows, loss, args.out)


if __name__ == "__main__":
    try:
        main()
    except data.DataError as error:
        raise SystemExit(f"data error: {error}") from None
