"""What the Hub takes in a card's metadata: checked before anything is trained or sent. Light, for the scripts check
their arguments with it.
"""

import re

LICENCES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m"
    " afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0"
    " cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0"
    " cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0"
    " cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl"
    " gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql"
    " ofl-1.1 ncsa unlicense zlib pddl lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 gemma unknown other"
).split()


class CardError(ValueError):
    """No card can be made of this: one sentence with what is wrong, and the way out."""


def languages_of(said: str | None) -> list[str]:
    """The codes in `en` or `en, de`; [] of nothing."""
    return [part.strip() for part in said.split(",")] if said else []


def is_language(code: object) -> bool:
    """Whether a value is a language code in the form that the Hub takes: `en`, `zh-Hant`."""
    return isinstance(code, str) and bool(re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?", code))


def check_metadata(data: dict) -> None:
    """Raise CardError for values that the Hub does not take. data: metadata of a card, and `data_license`, which is
    that of a dataset.
    """
    for key in ("license", "data_license"):
        if data.get(key) and data[key] not in LICENCES:
            raise CardError(
                f"--card_{key} {data[key]} is not a license that the Hub knows: use one of"
                f" {', '.join(LICENCES[:4])} ..., or other."
            )
    languages = data.get("language") or []
    for language in [languages] if isinstance(languages, str) else languages:
        if not is_language(language):
            raise CardError(
                f"--card_language {language} is not an ISO 639 code, such as en, de, zh ... (of several: en,de)."
            )
    for key in ("base_model", "datasets", "source_datasets"):
        for name in [data[key]] if isinstance(data.get(key), str) else data.get(key) or []:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
                raise CardError(f"{key} {name} is not a Hub id: owner/name.")
