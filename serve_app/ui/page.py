"""The page: fields, buttons and tabs, and which action each calls. Everything it looks like is in style.css."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from serve_app.ui import markup
from serve_app.ui.actions import MAX_COMPARED, MAX_SHOWN, Actions
from serve_app.ui.client import Trouble
from serve_app.ui.rollouts import ACTIONS

# More than fit are told that the page is busy.
_MAX_WAITING = 128
_AT_ONCE = 16
_FLEET_EVERY_S, _ROLLOUT_EVERY_S = 3.0, 2.0
_MAX_FILE_BYTES = 8 * 2**20
# Fonts of the reader's own machine: nothing is fetched from elsewhere.
_FONT = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")

# The file is read in the browser, and the CSV is made into one there: the page's server keeps no files.
_READ_FILE = f"""(current) => new Promise((resolve) => {{
  const input = document.createElement("input");
  input.type = "file";
  input.accept = ".jsonl,.json,.csv,.txt";
  input.oncancel = () => resolve(current);
  input.onchange = async () => {{
    const file = input.files[0];
    if (file.size > {_MAX_FILE_BYTES}) {{
      alert("The file has " + file.size + " bytes; allowed: {_MAX_FILE_BYTES}.");
      return resolve(current);
    }}
    const bytes = new Uint8Array(await file.arrayBuffer());
    const utf16 = {{0xfffe: "utf-16le", 0xfeff: "utf-16be"}}[bytes[0] << 8 | bytes[1]];
    for (const encoding of utf16 ? [utf16] : ["utf-8", "gb18030"]) {{
      try {{
        return resolve(new TextDecoder(encoding, {{fatal: true}}).decode(bytes));
      }} catch {{}}
    }}
    alert("The file is no text in UTF-8, UTF-16 or GB 18030.");
    resolve(current);
  }};
  input.click();
}})"""
_SAVE_CSV = """(csv) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv], {type: "text/csv;charset=utf-8"}));
  link.download = "reranked.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""


def theme() -> gr.themes.Base:
    return gr.themes.Default(font=list(_FONT), font_mono=list(_MONO), text_size=gr.themes.sizes.text_md)


def style() -> str:
    return (Path(__file__).parent / "style.css").read_text("utf-8")


def build_page(actions: Actions) -> gr.Blocks:
    with gr.Blocks(title="serve-app", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_classes="keys"):
            gr.HTML("<h1>serve-app</h1>", elem_classes="top")
            # Where no key is needed, none is asked for.
            with gr.Row(elem_classes="keys") as keys:
                key = _key("API key", "api-key")
                connect = gr.Button("Connect", elem_id="connect", scale=0)
        status = gr.HTML(elem_id="status")
        with gr.Column(visible=False, elem_id="tabs") as tabs, gr.Tabs():
            with gr.Tab("Search", id="search") as search_tab:
                search_model = _search(actions, key)
            with gr.Tab("Compare", id="compare") as compare_tab:
                compare_models = _compare(actions, key)
            with gr.Tab("Rerank", id="rerank") as rerank_tab:
                rerank_model = _rerank(actions, key)
            with gr.Tab("Fleet", id="fleet") as fleet_tab:
                fleet_timer, fleet_shown = _fleet(actions, key)
            with gr.Tab("Rollouts", id="rollouts") as rollouts_tab:
                rollout_timer = _rollouts(actions, rollouts_tab)

        async def connected(key: str) -> tuple[Any, ...]:
            try:
                names = await actions.names(key)
            except Trouble as trouble:
                kind = "note" if trouble.needs_key and not key else "error"
                return (
                    markup.notice(str(trouble), kind),
                    gr.Row(visible=True),
                    gr.Column(visible=False),
                    *[gr.skip()] * 3,
                )
            return (
                "",
                gr.Row(visible=bool(key)),
                gr.Column(visible=True),
                gr.Dropdown(choices=list(names.all), value=names.all[0]),
                gr.Dropdown(
                    choices=list(names.all), value=list(names.all[1:3] if len(names.all) > 2 else names.all)
                ),
                gr.Dropdown(choices=list(names.rerankers), value=next(iter(names.rerankers), None)),
            )

        outputs = [status, keys, tabs, search_model, compare_models, rerank_model]
        gr.on([page.load, key.submit, connect.click], connected, key, outputs, **_quiet())
        for tab in (search_tab, compare_tab, rerank_tab, fleet_tab, rollouts_tab):
            # Only what is looked at is asked for.
            on = (tab is fleet_tab, tab is rollouts_tab)
            tab.select(
                lambda on=on: tuple(gr.Timer(active=active) for active in on),
                None,
                [fleet_timer, rollout_timer],
                **_quiet(),
            )
        fleet_tab.select(actions.fleet, key, fleet_shown, **_quiet())
    page.queue(max_size=_MAX_WAITING, default_concurrency_limit=_AT_ONCE)
    return page


def _search(actions: Actions, key: gr.Textbox) -> gr.Dropdown:
    with gr.Row(elem_classes="ask"):
        query = _query("search-query")
        model = gr.Dropdown([], label="Route, pipeline, variant", scale=2, elem_id="search-model")
        button = gr.Button("Search", variant="primary", scale=0, elem_id="search")
    instruction, top_n = _more()
    shown = gr.HTML(markup.empty("Enter a query, in English or Chinese."), elem_id="search-results")
    gr.on([button.click, query.submit], actions.search, [key, query, model, instruction, top_n], shown, **_loud())
    return model


def _compare(actions: Actions, key: gr.Textbox) -> gr.Dropdown:
    with gr.Row(elem_classes="ask"):
        query = _query("compare-query")
        models = gr.Dropdown(
            [],
            label=f"Two to {MAX_COMPARED} routes, pipelines, variants",
            multiselect=True,
            max_choices=MAX_COMPARED,
            scale=3,
            elem_id="compare-models",
        )
        button = gr.Button("Compare", variant="primary", scale=0, elem_id="compare")
    instruction, top_n = _more()
    shown = gr.HTML(
        markup.empty("The same query through each; what differs is marked."), elem_id="compare-results"
    )
    inputs = [key, query, models, instruction, top_n]
    gr.on([button.click, query.submit], actions.compare, inputs, shown, **_loud())
    return models


def _rerank(actions: Actions, key: gr.Textbox) -> gr.Dropdown:
    with gr.Row(elem_classes="ask"):
        query = _query("rerank-query")
        model = gr.Dropdown([], label="Route, pipeline, variant", scale=2, elem_id="rerank-model")
    text = gr.Textbox(
        label="Documents",
        info="One a line; or JSON Lines or a JSON array with text (and id, query), or CSV with a column text "
        "(and id, query). With a query of their own, many queries run as a batch.",
        lines=6,
        max_lines=14,
        elem_id="rerank-documents",
    )
    instruction, _ = _more(with_top=False)
    with gr.Row(elem_classes="buttons"):
        file = gr.Button("From a file …", elem_id="rerank-file")
        button = gr.Button("Rerank", variant="primary", elem_id="rerank")
        save = gr.Button("Download CSV", interactive=False, elem_id="rerank-save")
    shown = gr.HTML(elem_id="rerank-results")
    csv = gr.Textbox(visible="hidden")

    async def rerank(*given: Any) -> AsyncIterator[tuple[Any, ...]]:
        async for html, made in actions.rerank(*given):
            yield html, made, gr.Button(interactive=bool(made))

    file.click(None, text, text, js=_READ_FILE)
    save.click(None, csv, None, js=_SAVE_CSV)
    gr.on(
        [button.click, query.submit],
        rerank,
        [key, query, text, model, instruction],
        [shown, csv, save],
        show_progress_on=shown,
        **_loud(),
    )
    return model


def _fleet(actions: Actions, key: gr.Textbox) -> tuple[gr.Timer, gr.HTML]:
    timer = gr.Timer(_FLEET_EVERY_S, active=False)
    shown = gr.HTML(markup.empty("Asking the fleet …"), elem_id="fleet")
    timer.tick(actions.fleet, key, shown, **_quiet())
    return timer, shown


def _rollouts(actions: Actions, tab: gr.Tab) -> gr.Timer:
    timer = gr.Timer(_ROLLOUT_EVERY_S, active=False)
    with gr.Row(elem_classes="keys"):
        admin_key = _key("Admin key", "admin-key")
        refresh = gr.Button("Show", elem_id="rollouts-show", scale=0)
    status = gr.HTML(elem_id="rollouts-status")
    chosen = gr.Dropdown([], label="Rollout", elem_id="rollout", visible=False)
    with gr.Row(visible=False, elem_classes="buttons") as row:
        buttons = {action: gr.Button(action.capitalize(), elem_id=f"rollout-{action}") for action in ACTIONS}
    shown = gr.HTML(elem_id="rollout-shown")

    async def listed(admin_key: str, chosen: str | None) -> tuple[Any, ...]:
        """The list anew; what was chosen stays so while it is there."""
        try:
            found = await actions.rollouts(admin_key)
        except Trouble as trouble:
            hidden = gr.Dropdown(visible=False), gr.Row(visible=False)
            return markup.notice(str(trouble), "error" if admin_key else "note"), *hidden, ""
        ids = [identity for _, identity in found]
        chosen = chosen if chosen in ids else next(iter(ids), None)
        shown = await actions.rollout(admin_key, chosen)
        return "", gr.Dropdown(choices=found, value=chosen, visible=bool(ids)), gr.Row(visible=bool(ids)), shown

    async def followed(admin_key: str, chosen: str | None) -> Any:
        return await actions.rollout(admin_key, chosen) if chosen and admin_key else gr.skip()

    outputs = [status, chosen, row, shown]
    gr.on([tab.select, refresh.click, admin_key.submit], listed, [admin_key, chosen], outputs, **_quiet())
    timer.tick(followed, [admin_key, chosen], shown, **_quiet())
    chosen.input(followed, [admin_key, chosen], shown, **_quiet())
    for action, button in buttons.items():

        async def act(admin_key: str, chosen: str | None, action: str = action) -> tuple[Any, ...]:
            said = await actions.act(admin_key, chosen, action)
            return said, *(await listed(admin_key, chosen))[1:]

        button.click(act, [admin_key, chosen], outputs, **_quiet())
    return timer


def _key(label: str, name: str) -> gr.Textbox:
    return gr.Textbox(
        label=label,
        show_label=False,
        container=False,
        placeholder=label,
        type="password",
        max_lines=1,
        html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
        elem_id=name,
        min_width=120,
        scale=4,
    )


def _query(name: str) -> gr.Textbox:
    return gr.Textbox(label="Query", max_lines=1, scale=4, elem_id=name)


def _more(with_top: bool = True) -> tuple[gr.Textbox, gr.Slider]:
    with gr.Accordion("More", open=False):
        instruction = gr.Textbox(
            label="Instruction",
            info="What counts as relevant, for models that read instructions; best in English.",
            max_lines=3,
        )
        top_n = gr.Slider(1, MAX_SHOWN, value=10, step=1, label="Results", visible=with_top)
    return instruction, top_n


def _loud() -> dict[str, Any]:
    """For what somebody waits for; private, because calls belong to the gateway's own API."""
    return {"api_visibility": "private", "show_progress": "minimal"}


def _quiet() -> dict[str, Any]:
    return {"api_visibility": "private", "show_progress": "hidden"}
