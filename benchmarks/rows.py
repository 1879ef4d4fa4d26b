"""Rows of a resumable benchmark: a CSV file that grows row by row."""
import csv
import os
from typing import Any, Dict, List, Sequence

__all__ = ['append', 'read']


def read(path: str) -> List[Dict[str, str]]:
    """Rows so far."""
    if not os.path.exists(path):
        return []
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def append(path: str, fields: Sequence[str], row: Dict[str, Any]) -> None:
    """Add a row, under a header where the file is new."""
    new = not os.path.exists(path)
    with open(path, 'a', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, fields, lineterminator='\n')
        if new:
            writer.writeheader()
        writer.writerow(row)
