"""01_data.py's door for folders: what people download is read as it is, every line of it is read or counted, and what
cannot be read is named with a remedy."""
import gzip
import json
import os
import random
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from conftest import SCRIPTS
from test_01_data import data_script, has_picture, histories, jpeg, lost_pictures, one_sentence, read, run

CASES = SCRIPTS[0].parent.parent / "shared" / "cases"
USERS = 25
ITEMS = 40
START = 1_600_000_000


# --- The layouts, as their sources write them -------------------------------------------------------------------------
class Layout(NamedTuple):
    log: str            # names of the two files
    catalogue: str
    event: Callable     # (user, item, seconds) -> a line
    item: Callable      # (item, title) -> a line
    log_header: str = ""
    catalogue_header: str = ""
    encoding: str = "utf-8"
    categories: list = ["Drama", "War"]


def amazon_2023(item, title):
    image = {"thumb": "https://host.example/t.jpg", "large": "https://host.example/l.jpg", "variant": "MAIN"}
    return json.dumps({"main_category": "Films", "title": title, "features": ["soft"], "description": ["good"],
                       "price": None, "images": [image], "categories": ["Drama", "War"], "parent_asin": f"B{item}"})


LAYOUTS = {
    "MovieLens latest": Layout(
        "ratings.csv", "movies.csv",
        lambda u, i, t: f"{u},{i},4.0,{t}", lambda i, title: f'{i},"{title}",Drama|War',
        "userId,movieId,rating,timestamp", "movieId,title,genres"),
    "MovieLens 1M": Layout(
        "ratings.dat", "movies.dat",
        lambda u, i, t: f"{u}::{i}::4::{t}", lambda i, title: f"{i}::{title}::Drama|War", encoding="latin-1"),
    "MovieLens 100K": Layout(
        "u.data", "u.item",
        lambda u, i, t: f"{u}\t{i}\t4\t{t}",
        lambda i, title: f"{i}|{title}|01-Jan-1995||http://host|0|0|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|1|0",
        encoding="latin-1"),
    "Amazon 2023": Layout(
        "Films.jsonl.gz", "meta_Films.jsonl.gz",
        lambda u, i, t: json.dumps({"rating": 5.0, "title": "a review", "images": [], "asin": f"A{i}",
                                    "parent_asin": f"B{i}", "user_id": f"U{u}", "timestamp": 1000 * t}), amazon_2023),
    "Amazon 2023, ratings only": Layout(
        "Films.csv.gz", "meta_Films.jsonl.gz",
        lambda u, i, t: f"U{u},B{i},5.0,{1000 * t}", amazon_2023, "user_id,parent_asin,rating,timestamp"),
    "Amazon 2018": Layout(
        "Films_5.json.gz", "meta_Films.json.gz",
        lambda u, i, t: json.dumps({"overall": 5.0, "reviewTime": "09 1, 2016", "reviewerID": f"U{u}", "asin": f"B{i}",
                                    "style": {"Size:": " 2"}, "unixReviewTime": t}),
        lambda i, title: json.dumps({"category": ["Drama", "War"], "description": [], "title": title, "feature": ["x"],
                                     "asin": f"B{i}", "imageURL": ["https://host.example/0.jpg"],
                                     "imageURLHighRes": []})),
    "Amazon 2014": Layout(
        "reviews_Films_5.json.gz", "meta_Films.json.gz",
        lambda u, i, t: json.dumps({"reviewerID": f"U{u}", "asin": f"B{i}", "helpful": [0, 0], "unixReviewTime": t}),
        lambda i, title: repr({"asin": f"B{i}", "title": title, "price": 1.5, "imUrl": "http://host.example/0.jpg",
                               "related": {}, "categories": [["Drama", "War"]]})),
    "PixelRec": Layout(
        "interactions/Pixel.csv", "information/Pixel.csv",
        lambda u, i, t: f"v{i},{u},{t}", lambda i, title: f'v{i},7,Drama,"{title}","two\nlines"',
        "item_id,user_id,timestamp", "item_id,view_number,tag,title,description", categories=["Drama"]),
    "MicroLens": Layout(
        "MicroLens_pairs.csv", "MicroLens_titles.csv",
        lambda u, i, t: f"{u},{i},{1000 * t}", lambda i, title: f'{i},"{title}"',
        "user,item,timestamp", "item,title", categories=[]),
    "RecBole": Layout(
        "films.inter", "films.item",
        lambda u, i, t: f"{u}\t{i}\t4\t{t}", lambda i, title: f"{i}\t{title}\tDrama|War",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float",
        "item_id:token\tmovie_title:token_seq\tclass:token_seq"),
    "Yelp": Layout(
        "academic_review.json", "academic_business.json",
        lambda u, i, t: json.dumps({"review_id": "r", "user_id": f"U{u}", "business_id": f"b{i}", "stars": 4.0,
                                    "date": str(np.datetime64(t, "s")).replace("T", " "), "text": "a review"}),
        lambda i, title: json.dumps({"business_id": f"b{i}", "name": title, "categories": "Drama|War"})),
    "semicolons": Layout(
        "EVENTS.CSV", "Items.Csv",
        lambda u, i, t: f"{u};{i};{t}", lambda i, title: f"{i};{title};Drama|War",
        " User ; Item_ID; Time", "item_id ;Title;Genre"),
    "tabs": Layout(
        "events.tsv.gz", "items.tsv",
        lambda u, i, t: f"{u}\t{i}\t{t}", lambda i, title: f"{i}\t{title}\tDrama|War",
        "user_id\titem_id\ttimestamp", "item_id\ttitle\tcategory"),
}


def title_of(item):
    return f"Misérables, Les: part {item}"


def thousand_events():
    """-> (user, item, seconds), each time once, in no order"""
    rng = random.Random(0)
    pairs = [(user, item) for user in range(USERS) for item in range(ITEMS)]
    rng.shuffle(pairs)
    return [(user, item, START + n) for n, (user, item) in enumerate(rng.sample(pairs, len(pairs)))]


def write(path, lines, encoding="utf-8"):
    """Lines of text, or of bytes as they are; packed where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join((line.encode(encoding) if isinstance(line, str) else line) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def lay_out(layout, folder, events=None, items=None):
    """Writes a folder in that layout. events, items: lines, else a thousand and forty"""
    if events is None:
        events = [layout.event(*event) for event in thousand_events()]
    if items is None:
        items = [layout.item(item, title_of(item)) for item in range(ITEMS)]
    for name, header, lines in ((layout.log, layout.log_header, events),
                                (layout.catalogue, layout.catalogue_header, items)):
        write(folder / name, [header, *lines] if header else lines, layout.encoding)
    return folder


def number(name):
    """B7, v7 and 7 are item 7."""
    return int(re.sub(r"\D", "", name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_as_downloaded_every_event_in_order_of_time_every_title_with_its_letters(tmp_path, name):
    layout = LAYOUTS[name]
    done = run(tmp_path / "run", "--dataset", lay_out(layout, tmp_path / "folder"), "--image-size", 8)
    data, _ = read(tmp_path / "run")
    expected = {}
    for user, item, _ in sorted(thousand_events(), key=lambda event: event[2]):
        expected.setdefault(user, []).append(item)
    found = {number(user): [number(item) for item in items] for user, items in histories(data).items()}
    assert found == expected
    assert data["titles"][1:] == [title_of(number(item)) for item in data["item_ids"][1:]]
    assert all(categories == layout.categories for categories in data["categories"][1:])
    assert not any(n for reason, n in data["meta"]["counts"].items() if reason.endswith("malformed line"))
    assert f"events: {layout.log}, where " in done.stdout and f"items: {layout.catalogue}, where " in done.stdout
    assert set(data["made_from"]) == {layout.log, layout.catalogue, "images.pt"}


# --- Which table is what ----------------------------------------------------------------------------------------------
def two_tables(folder, time=lambda u, i: START + i, ids=str, users=6, items=6):
    """events.csv and items.csv. time: (user, item) -> what is written; ids: how the catalogue writes them"""
    events = [f"u{u},{i},{time(u, i)}" for u in range(users) for i in range(items)]
    write(folder / "events.csv", ["user_id,item_id,timestamp", *events])
    write(folder / "items.csv", ["item_id,title", *(f"{ids(i)},Film {i}" for i in range(items))])
    return folder


def test_other_tables_hidden_files_and_doubles_beside_the_two_are_left_alone_and_said(tmp_path):
    folder = lay_out(LAYOUTS["MovieLens latest"], tmp_path / "folder")
    write(folder / "links.csv", ["movieId,imdbId,tmdbId", "1,2,3"])
    write(folder / "tags.csv", ["userId,movieId,tag,timestamp", f"1,1,slow,{START}"])
    write(folder / "ratings.csv.gz", (folder / "ratings.csv").read_text().split("\n")[:50])
    for hidden in ("._movies.csv", "__MACOSX/._ratings.csv", ".ipynb_checkpoints/ratings-checkpoint.csv"):
        write(folder / hidden, (folder / "ratings.csv").read_text().split("\n"))
    done = run(tmp_path / "run", "--dataset", folder, "--image-size", 8)
    assert "not read: links.csv, tags.csv\n" in done.stdout
    assert read(tmp_path / "run")[0]["meta"]["counts"]["events: well-formed"] == USERS * ITEMS


def test_parts_of_one_table_are_not_lost_but_asked_for(tmp_path):
    folder = two_tables(tmp_path / "folder")
    write(folder / "test.csv", ["user_id,item_id,timestamp", "u0,1,5"])
    said = one_sentence(run(tmp_path / "run", "--dataset", folder, ok=False))
    assert "2 tables of events with the same columns: events.csv, test.csv" in said
    (folder / "test.csv").rename(folder / "more.csv")
    write(folder / "more.csv", ["item_id,title", "9,Film 9"])
    said = one_sentence(run(tmp_path / "run", "--dataset", folder, ok=False))
    assert "2 tables of items with the same columns: items.csv, more.csv" in said


def test_events_alone_are_a_shop_without_words(tmp_path):
    folder = two_tables(tmp_path / "folder")
    (folder / "items.csv").unlink()
    done = run(tmp_path / "run", "--dataset", folder, "--image-size", 8)
    data, _ = read(tmp_path / "run")
    assert "no table says more of them than their ids" in done.stdout and data["titles"] == [""] * 7
    assert "with words, for 04: 0.0%" in done.stdout


def test_what_is_read_in_part_is_counted_too(tmp_path):
    """Ratings in words, a line without its last separator, a text that is cut; titles that the log has are named."""
    folder = two_tables(tmp_path / "folder")
    events = (folder / "events.csv").read_text().split()[1:]
    stars = ["5 stars", "4,5", "5", "-1", ""]  # the second has a comma too many
    lines = [f"{event},{stars[n % 5]}" for n, event in enumerate(events)]
    write(folder / "events.csv", ["user_id,item_id,timestamp,rating", *lines, "u0,1 1600000000"])
    items = [{"item_id": str(i), "title": 1980.0 + i, "images": {"large": f"{i}.jpg"}} for i in range(6)]
    items[0]["description"] = "w" * 2001
    (folder / "items.csv").unlink()
    write(folder / "items.jsonl", map(json.dumps, items))
    run(tmp_path / "run", "--dataset", folder, "--image-size", 8, "--k-core", 3)
    data, _ = read(tmp_path / "run")
    counts = data["meta"]["counts"]
    assert counts["events: rating not understood, level 0"] == 8 and counts["events.csv: malformed line"] == 7
    assert counts["events.csv: line with fewer columns than the header"] == 1 and counts["events: bad time"] == 1
    assert counts["items: title or text cut"] == 1 and len(data["texts"][1]) == 2000
    assert data["titles"][1:] == [str(1980 + i) for i in range(6)]
    assert counts["items: picture is named, but no such file"] == 6

    write(folder / "events.csv", ["user_id,item_id,timestamp,title", *(f"{event},good" for event in events)])
    (folder / "items.jsonl").unlink()
    done = run(tmp_path / "other", "--dataset", folder, "--image-size", 8)
    assert "not read of events.csv: title" in done.stdout


def test_titles_without_a_known_column_of_ids_stop_the_run(tmp_path):
    folder = two_tables(tmp_path / "folder")
    write(folder / "items.csv", ["code,title", "1,Film 1"])
    said = one_sentence(run(tmp_path / "run", "--dataset", folder, ok=False))
    assert "no table of items" in said and "items.csv (code, title)" in said and "item_id" in said


@pytest.mark.parametrize("ids, shown", [(lambda i: f"{i}.0", "0.0, 1.0, 2.0"), (lambda i: f"00{i}", "000, 001, 002")])
def test_a_catalogue_that_fits_no_event_stops_the_run_with_ids_of_both(tmp_path, ids, shown):
    folder = two_tables(tmp_path / "folder", ids=ids)
    said = one_sentence(run(tmp_path / "run", "--dataset", folder, ok=False))
    assert "No line of the catalogue fits an event" in said and "the items 0, 1, 2" in said and shown in said
    assert not (tmp_path / "run").exists()


def test_a_catalogue_that_fits_few_events_is_said_with_ids_of_both(tmp_path):
    folder = two_tables(tmp_path / "folder", ids=lambda i: i if i < 2 else f"0{i}")
    done = run(tmp_path / "run", "--dataset", folder, "--image-size", 8)
    assert "Only 2 of 6 items are in the catalogue: events have the items 2, 3, 4; " in done.stdout
    assert "lines of the catalogue are of 02, 03, 04" in done.stdout


def test_where_tables_have_ids_of_several_kinds_they_meet_in_the_one_that_both_have(tmp_path):
    events = [f"u{u},x{i},{i},{START + i}" for u in range(6) for i in range(6)]
    write(tmp_path / "folder" / "e.csv", ["user_id,item_id,movieId,timestamp", *events])
    write(tmp_path / "folder" / "i.csv", ["asin,MovieID,title", *(f"B{i},{i},Film {i}" for i in range(6))])
    done = run(tmp_path / "run", "--dataset", tmp_path / "folder", "--image-size", 8)
    data, _ = read(tmp_path / "run")
    assert data["item_ids"][1:] == list("012345") and data["titles"][6] == "Film 5"
    assert "movieId or item_id is item" in done.stdout and "MovieID or asin is item" in done.stdout


def test_a_parent_asin_that_is_null_falls_back_on_asin_and_an_id_may_be_a_whole_float(tmp_path):
    lines = []
    for u in range(6):
        for i in range(6):
            lines.append(json.dumps({"user_id": f"u{u}", "parent_asin": None, "asin": float(i), "timestamp": i}))
    write(tmp_path / "folder" / "e.jsonl", lines)
    write(tmp_path / "folder" / "i.jsonl", [json.dumps({"parent_asin": i, "title": f"Film {i}"}) for i in range(6)])
    run(tmp_path / "run", "--dataset", tmp_path / "folder", "--image-size", 8)
    data, _ = read(tmp_path / "run")
    assert data["item_ids"][1:] == list("012345") and data["titles"][6] == "Film 5"


# --- Times ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("written", [
    lambda t: t, lambda t: 1000 * t, lambda t: 10 ** 6 * t, lambda t: 10 ** 9 * t, lambda t: t / 10,
    lambda t: t - START, lambda t: np.datetime64(t, "s"), lambda t: str(np.datetime64(t, "s")).replace("T", " "),
    lambda t: f"{np.datetime64(t, 's')}+00:00", lambda t: f"{np.datetime64(t, 's')}Z",
    lambda t: str(np.datetime64(t, "s")).replace("T", " ") + " UTC",
    lambda t: re.sub(r"\D", "", str(np.datetime64(t, "s"))), lambda t: np.datetime64(t - START, "D"),
], ids=["s", "ms", "us", "ns", "fractions", "ranks", "T", "blank", "zone", "Z", "UTC", "YYYYMMDDhhmmss",
        "days of 1970"])
def test_times_are_understood_in_any_usual_form(tmp_path, written):
    folder = two_tables(tmp_path / "folder", time=lambda u, i: written(START + 55 * (i * (u + 1) % 7)))
    run(tmp_path / "run", "--dataset", folder, "--image-size", 8)
    for user, items in histories(read(tmp_path / "run")[0]).items():
        step = number(user) + 1
        assert items == sorted(items, key=lambda item: int(item) * step % 7)


def test_of_two_columns_with_one_name_the_first_is_read_and_it_is_said(tmp_path, scripts):
    """A join in SQL gives them; a dict keeps the last, which here would be one item for all."""
    (tmp_path / "joined.csv").write_text("user_id,item_id,timestamp,item_id\n" + "".join(
        f"u{n % 4},i{n // 4},{n},same\n" for n in range(20)))
    counts = Counter()
    rows = list(scripts[1].read_table(tmp_path / "joined.csv", counts))
    assert [row["item_id"] for row in rows] == [f"i{n // 4}" for n in range(20)]
    assert counts == {"joined.csv: columns named item_id again, not read": 1}


@pytest.mark.parametrize("value", ["-400000000", "noon", "01/02/2020", "1,600,000,000", "9e99", "nan"])
def test_a_column_without_a_time_that_is_understood_is_named_with_a_value(tmp_path, value):
    folder = two_tables(tmp_path / "folder", time=lambda u, i: f'"{value}"')
    said = one_sentence(run(tmp_path / "run", "--dataset", folder, ok=False))
    assert "events.csv: column timestamp" in said and repr(value) in said and "2020-09-13 12:26:40" in said
    assert not (tmp_path / "run").exists()


# --- What is refused --------------------------------------------------------------------------------------------------
EVENTS = [{"user_id": f"u{u}", "item_id": f"i{i}", "timestamp": i} for u in range(6) for i in range(6)]
NOT_READ = {
    "a.parquet": (b"PAR1" + bytes(99) + b"PAR1", "Parquet"),
    "a.xlsx": (b"PK\3\4" + bytes(99), "Excel"),
    "a.xls": (b"\xd0\xcf\x11\xe0" + bytes(99), "Excel"),
    "a.csv": ("user_id,item_id,timestamp\nu,i,1\n".encode("utf-16"), "UTF-16"),
    "b.csv": (b"".join(b"u%d,i%d,%d\n" % (n % 6, n % 5, n) for n in range(99)), "no header, its first line is u0,i0,0"),
    "a.json": (json.dumps(EVENTS).encode(), "JSON array"),
    "b.json": (json.dumps(EVENTS, indent=1).encode(), "JSON array"),
    "a.jsonl": (b"".join(json.dumps(event).encode() + b",\n" for event in EVENTS), "JSON array"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_no_table_is_named_as_what_it_is_with_the_python_that_makes_one(tmp_path, name):
    content, kind = NOT_READ[name]
    folder = two_tables(tmp_path / "folder")
    (folder / "events.csv").unlink()
    (folder / name).write_bytes(content)
    said = one_sentence(run(tmp_path / "run", "--dataset", folder, ok=False))
    assert name in said and kind in said and not (tmp_path / "run").exists()
    assert "import pandas; pandas.read" in said or "open(" in said


@pytest.mark.parametrize("name", ["a.csv", "b.csv", "a.json", "b.json", "a.jsonl"])
def test_the_python_that_is_offered_makes_a_table(tmp_path, monkeypatch, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(NOT_READ[name][0])
    said = one_sentence(run(tmp_path / "run", "--dataset", folder, ok=False))
    monkeypatch.chdir(folder)
    offered = re.search(r"(import json; |text = open).*?(?=, with a name for each column|\.$)", said)[0]
    exec(offered, {})
    tables = [data_script.look_at(path) for path in data_script.find_tables(folder)]
    assert any(table.columns.keys() >= {"user", "item", "time"} for table in tables)


# --- Letters ----------------------------------------------------------------------------------------------------------
def test_letters_that_are_not_utf_8_are_read_as_latin_1_and_counted(tmp_path):
    folder = two_tables(tmp_path / "folder")
    lines = ["item_id,title", "0,caf\xe9 \u201cBar\u201d", "1,plain"]
    (folder / "items.csv").write_bytes("\n".join(lines).encode("cp1252"))
    done = run(tmp_path / "run", "--dataset", folder, "--image-size", 8)
    data, _ = read(tmp_path / "run")
    assert data["titles"][1:3] == ["café “Bar”", "plain"]
    assert data["meta"]["counts"]["not UTF-8, read as Latin-1: lines of items.csv"] == 1
    assert "not UTF-8, read as Latin-1: lines of items.csv" in done.stdout


# --- Lines that are nearly right --------------------------------------------------------------------------------------
def mutated(line, rng):
    """One line with a few bytes changed, lost or put in; often it is one more or one less of what separates."""
    line = bytearray(line)
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        place = rng.randrange(len(line) + 1)
        kind = rng.random()
        if kind < 0.3:
            line[place:place] = rng.choice([b",", b";", b"\t", b"|", b"::", b'"', b"'", b"{", b"}", b"[", b"\\", b"-",
                                            b"\0", b"\r", b"\n", b"\xe9", b"\x1f", b"\xef\xbb\xbf", b"9" * 30])
        elif kind < 0.6:
            line[place:place + rng.randrange(1, 4)] = b""
        elif kind < 0.9:
            line[place:place + 1] = bytes([rng.randrange(256)])
        else:
            line = line[:place]
    return bytes(line)


def lines_in(lines):
    """How many a reader sees, for whom \\r, \\n and both end a line."""
    return len(re.findall(rb"[^\r\n]+", b"\n".join(lines))), re.split(rb"\r\n|\r|\n", b"\n".join(lines))


@pytest.mark.parametrize("name", LAYOUTS)
def test_of_ten_thousand_mutated_lines_none_is_fatal_and_all_are_read_or_counted(tmp_path, name):
    layout = LAYOUTS[name]
    rng = random.Random(zlib.crc32(name.encode()))
    events = [layout.event(*event).encode(layout.encoding) for event in thousand_events()]
    items = [layout.item(item, title_of(item)).encode(layout.encoding) for item in range(ITEMS)]
    fuzzed_events = events + [mutated(rng.choice(events), rng) for _ in range(10_000)]
    fuzzed_items = items + [mutated(rng.choice(items), rng) for _ in range(10_000)]
    folder = lay_out(layout, tmp_path / "folder", fuzzed_events, fuzzed_items)
    run(tmp_path / "run", "--dataset", folder, "--image-size", 8, "--k-core", 1)
    data, _ = read(tmp_path / "run")
    counts = Counter(data["meta"]["counts"])

    of_events = sum(counts[f"events: {why}"] for why in ("well-formed", "no user", "no item", "bad time"))
    found = len(data["item_ids"]) - 1 - counts["items: not in the catalogue"]
    of_items = found + counts["catalogue: line of an item not kept, or its second"]
    if Path(layout.log).name == Path(layout.catalogue).name:  # PixelRec's tables have one name
        read_all = [(layout.log, fuzzed_events + fuzzed_items, of_events + of_items)]
    else:
        read_all = [(layout.log, fuzzed_events, of_events), (layout.catalogue, fuzzed_items, of_items)]
    for path, lines, rows in read_all:
        table = Path(path).name
        rows += counts[f"{table}: malformed line"] + counts[f"{table}: line inside a quoted text, or blank"]
        filled, all_lines = lines_in(lines)
        assert filled <= rows <= len(all_lines)
    assert counts["events: well-formed"] > 2500 and found >= ITEMS - 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_that_are_damaged_anywhere_end_in_a_run_or_in_one_sentence(tmp_path, name):
    layout = LAYOUTS[name]
    rng = random.Random(1)
    events = [layout.event(user, item, START + item) for user in range(5) for item in range(ITEMS)]
    for n in range(10):
        folder = lay_out(layout, tmp_path / f"folder{n}", events)
        for path in (folder / layout.log, folder / layout.catalogue):
            data = path.read_bytes()
            begin = rng.choice([0, 0, rng.randrange(len(data))])
            path.write_bytes(data[:begin] + mutated(data[begin:begin + 60], rng) + data[begin + 60:])
        done = run(tmp_path / "run", "--dataset", folder, "--image-size", 8, ok=False)
        if done.returncode:
            one_sentence(done)


# --- Pictures ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["images", "cover", "MicroLens_covers"])
def test_pictures_are_found_by_the_id_of_their_item_whatever_their_ending(tmp_path, place):
    folder = two_tables(tmp_path / "folder")
    (folder / place).mkdir()
    endings = [".jpg", ".JPEG", ".png", ".Webp", ".JPG", ".bmp"]
    for i, ending in enumerate(endings):
        Image.new("RGB", (9, 9), "red").save(folder / place / f"{i}{ending}")
    run(tmp_path / "run", "--dataset", folder, "--image-size", 8)
    assert list(has_picture(read(tmp_path / "run")[0]).values()) == [False, True, True, True, True, True, False]


def test_pictures_that_are_urls_are_said_in_one_line_and_fetched_if_that_is_asked(tmp_path, monkeypatch):
    asked = []

    def download(session, url, path, picture):
        asked.append(url)
        path.write_bytes(jpeg("red"))

    monkeypatch.setattr(data_script, "download", download)
    folder = lay_out(LAYOUTS["Amazon 2023"], tmp_path / "folder")
    done = run(tmp_path / "run", "--dataset", folder, "--image-size", 8)
    said = [line for line in done.stdout.split("\n") if "URL" in line]
    assert len(said) == 1 and str(ITEMS) in said[0] and "--fetch-images" in said[0] and not asked
    run(tmp_path / "run", "--dataset", folder, "--image-size", 8, "--fetch-images")
    assert asked == ["https://host.example/l.jpg"] * ITEMS
    run(tmp_path / "run", "--dataset", folder, "--image-size", 8)  # they lie in the folder now
    assert all(read(tmp_path / "run")[0]["has_image"][1:]) and len(asked) == ITEMS


def test_a_photo_of_48_megapixels_is_read_and_a_bomb_is_not_without_a_warning(tmp_path, recwarn):
    folder = two_tables(tmp_path / "folder")
    (folder / "images").mkdir()
    Image.new("RGB", (8000, 6000), "red").save(folder / "images" / "0.jpg")
    Image.new("1", (8000, 6000)).save(folder / "images" / "1.png")    # as large, and decoded whole
    Image.new("L", (9000, 9000)).save(folder / "images" / "2.jpg")    # 81 megapixels
    run(tmp_path / "run", "--dataset", folder, "--image-size", 64)
    data, images = read(tmp_path / "run")
    assert list(has_picture(data).values()) == [False, True, False, False, False, False, False]
    assert images[1, 0].min() > 240 and lost_pictures(data) == 2


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_picture_whose_exif_is_broken_is_read_as_it_is(tmp_path, ending):
    folder = two_tables(tmp_path / "folder")
    (folder / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 2
    exif[0x011A] = TiffImagePlugin.IFDRational(1, 1)
    broken = exif.tobytes().replace(b"\1\0\0\0\1\0\0\0", b"\1\0\0\0\0\0\0\0")  # x / 0
    Image.new("RGB", (30, 20), "red").save(folder / "images" / f"0.{ending}", exif=broken)
    Image.new("RGB", (30, 20), "red").save(folder / "images" / f"1.{ending}", exif=b"Exif\0\0no such thing")
    run(tmp_path / "run", "--dataset", folder, "--image-size", 8)
    assert list(has_picture(read(tmp_path / "run")[0]).values())[:4] == [False, True, True, False]


# --- What is said, and --smoke ----------------------------------------------------------------------------------------
def test_the_shares_that_are_said_are_those_that_03_and_04_find(tmp_path, scripts):
    folder = two_tables(tmp_path / "folder", users=9, items=10)
    write(folder / "items.csv", ["item_id,title,description,genres", "0,Film,,", "1,,a text,", "2,,,War", "3,?,!,",
                                 "4,Film,text,War"])
    (folder / "images").mkdir()
    (folder / "images" / "7.jpg").write_bytes(jpeg("red"))
    done = run(tmp_path / "run", "--dataset", folder, "--image-size", 8)
    assert "with a picture, for 03: 10.0%; with words, for 04: 40.0% (a title 30.0%, a text 30.0%)" in done.stdout
    data, _ = read(tmp_path / "run")
    fields = zip(data["titles"], data["categories"], data["texts"])
    known = [bool(re.search(r"\w", scripts[4].item_text(*field))) for field in fields]
    assert sum(known) == 4 and int(data["has_image"].sum()) == 1


def test_smoke_keeps_a_dense_part_of_a_sparse_shop(tmp_path):
    """1500 items of which few are frequent, 3000 users with 4 events: the users stay who have most of the frequent."""
    rng = np.random.default_rng(0)
    lines = []
    for user in range(3000):
        for item in rng.zipf(1.3, 4) % 1500:
            lines.append(f"u{user},i{item},{len(lines)}")
    write(tmp_path / "folder" / "events.csv", ["user_id,item_id,timestamp", *lines])
    run(tmp_path / "run", "--dataset", tmp_path / "folder", "--smoke", "--image-size", 8)
    data, _ = read(tmp_path / "run")
    assert len(data["user_ids"]) == 200 and 20 <= len(data["item_ids"]) - 1 <= 60
    assert data["offsets"].diff().min() == 4 and data["meta"]["options"]["k_core"] == 1
    said = one_sentence(run(tmp_path / "run", "--dataset", tmp_path / "folder", "--smoke", "--k-core", 200, ok=False))
    assert "200-core" in said


# --- Folders as people had them ---------------------------------------------------------------------------------------
REFUSED = {
    "ids-1.0-and-1": "No line of the catalogue fits an event",
    "leading-zeros-lost": "No line of the catalogue fits an event",
    "negative": "column timestamp has no time",
    "no-column": "the nearest lacks time",
    "no-header": "events.csv has no header",
    "json-array": "e.jsonl has no JSON object a line",
    "trailing-commas": "e.jsonl has no JSON object a line",
    "utf16": "events.csv is UTF-16",
    "parquet": "is Parquet",
}
FOUND = {  # what only a right reading has
    "ml-1m": "Misérables, Les 0 (1995)",
    "ml-100k": "Film 0",
    "movielens-as-downloaded": "Film 1, The (1970)",
    "latin1-titles": "Misérables, Les 0",
    "microlens": "T 0",
    "amazon2014-json.gz": "Cream 0",
    "recbole-inter": "T 0",
}


def cases():
    return sorted(path.name for path in CASES.iterdir() if path.is_dir()) if CASES.is_dir() else ["none"]


@pytest.mark.parametrize("name", cases())
def test_a_folder_as_people_have_it_is_read_or_refused_in_a_sentence(tmp_path, name):
    folder = CASES / name
    if not folder.is_dir() and not os.environ.get("CI"):
        pytest.skip(f"{CASES} is not here: folders to try, not part of the product")
    done = run(tmp_path / "run", "--dataset", folder, "--k-core", 1, "--image-size", 8, ok=name not in REFUSED)
    if name in REFUSED:
        said = one_sentence(done)
        assert REFUSED[name] in said and not (tmp_path / "run").exists()
        return
    data, _ = read(tmp_path / "run")
    of_pictures = name in ("exif-zero-denominator", "png-jpeg-JPG-webp-names")
    sizes = len(data["user_ids"]), len(data["item_ids"]) - 1, len(data["events"])
    assert sizes == ((8, 40, 320) if of_pictures else (12, 8, 96))
    assert all(data["titles"][1:]) and FOUND.get(name, data["titles"][1]) == data["titles"][1]
    assert int(data["has_image"].sum()) == {"exif-zero-denominator": 1, "png-jpeg-JPG-webp-names": 4}.get(name, 0)
    assert data["categories"][1] == (["Comedy", "Drama"] if "genres" in done.stdout and "dat" not in done.stdout
                                     else data["categories"][1])
    if name in ("date", "iso", "ns"):
        assert histories(data) == histories_of_seconds(folder)
    urls = [line for line in done.stdout.split("\n") if "--fetch-images" in line]
    assert len(urls) == (1 if name.startswith(("amazon", "urls", "csv.gz")) else 0)


def histories_of_seconds(folder):
    """The order of the events in the file, which is that of their times in these folders."""
    found = {}
    for line in (folder / "events.csv").read_text().split("\n")[1:]:
        if line:
            user, item, _ = line.split(",")
            found.setdefault(user, []).append(item)
    return found
