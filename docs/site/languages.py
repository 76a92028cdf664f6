"""An mkdocs hook: pages named `*.zh-CN.md` are Chinese, and each page links to its translation."""

from typing import Any

_CHINESE = ".zh-CN.md"
_CHINESE_START = f"quick-start{_CHINESE}"


def on_page_context(context: dict[str, Any], *, page: Any, config: Any, nav: Any) -> dict[str, Any]:
    """Set the theme's language, and with it the page's `lang` attribute, and the links of the language switch."""
    name = page.file.src_uri
    is_chinese = name.endswith(_CHINESE)
    stem = name.removesuffix(_CHINESE) if is_chinese else name.removesuffix(".md")
    urls = {page.file.src_uri: page.url for page in nav.pages}
    config.theme["language"] = "zh" if is_chinese else "en"
    config.extra["alternate"] = [
        {"name": "English", "link": urls.get(f"{stem}.md", urls["index.md"]) or ".", "lang": "en"},
        {"name": "中文", "link": urls.get(stem + _CHINESE, urls[_CHINESE_START]), "lang": "zh"},
    ]
    return context
