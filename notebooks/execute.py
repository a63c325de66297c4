"""Run notebooks and keep their outputs: .venv/bin/python notebooks/execute.py notebooks/*.ipynb

Kernels start in the folder of the notebook, as in Jupyter. Times and versions are not kept, so a
second run with the same numbers leaves the same file.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path, **parameters) -> nbformat.NotebookNode:
    """Run a notebook and return it with its outputs.

    parameters: replace those in the cell with this tag. A cell that fails raises
    nbclient.exceptions.CellExecutionError.
    """
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    where, quiet = {"metadata": {"path": str(path.parent)}}, ["--log-level=ERROR"]
    NotebookClient(
        notebook, resources=where, record_timing=False, coalesce_streams=True, extra_arguments=quiet
    ).execute()
    name = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": name, "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        nbformat.write(execute(path), path)
