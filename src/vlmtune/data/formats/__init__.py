"""The data formats, one file each. A new one is a file with a ``FORMAT`` record and a line here."""

from __future__ import annotations

from vlmtune.data.formats import (
    chartqa,
    class_folders,
    coco_captions,
    coco_instances,
    docvqa,
    easy_vqa,
    flickr,
    image_text_pairs,
    imagefolder,
    llava,
    messages,
    mixture,
    refcoco,
    scienceqa,
    tables,
    textvqa,
    vqav2,
    webdataset,
)
from vlmtune.data.formats.base import Format, Source

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        flickr.FORMAT,
        coco_captions.FORMAT,
        coco_instances.FORMAT,
        refcoco.FORMAT,
        imagefolder.FORMAT,
        image_text_pairs.FORMAT,
        class_folders.FORMAT,
        easy_vqa.FORMAT,
        vqav2.FORMAT,
        textvqa.FORMAT,
        docvqa.FORMAT,
        chartqa.FORMAT,
        scienceqa.FORMAT,
        llava.FORMAT,
        messages.FORMAT,
        tables.FORMAT,
        webdataset.FORMAT,
        mixture.FORMAT,
    )
}

__all__ = ["FORMATS", "Format", "Source"]
