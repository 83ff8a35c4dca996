"""Conversations as people keep them, turn by turn: OpenAI's, ShareGPT's, pairs; tool calls, parts, marks. Pure.

A turn comes out as {"role", "content"}, with `reasoning_content`, `tool_calls`, `tool_call_id` and `name` where it has
them, and `untrained` where a mark says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from utils.data.labelled import marks
from utils.data.labelled.column_roles import ROLE_KEYS
from utils.data.labelled.row_text import LeftOutError, RowError, clean, is_missing, only_thoughts, split_thinking

Turn = dict[str, Any]
_ASSISTANT = ("assistant", "gpt", "chatgpt", "model", "bot", "ai", "chatbot", "bing", "bard", "claude", "llm", "agent")
_TOOL = ("tool", "function", "observation", "tool_response", "tool_result", "ipython", "tool_results")
_CALL = ("function_call", "tool_call", "tool_calls")
_ROLES = dict.fromkeys(_ASSISTANT, "assistant") | dict.fromkeys(_TOOL, "tool") | dict.fromkeys(_CALL, "call")
_ROLES |= {
    "human": "user",
    "prompter": "user",
    "user": "user",
    "customer": "user",
    "client": "user",
    "system": "system",
    "developer": "system",
}
_TEXT_KEYS = ("content", "value", "text", "message", "utterance", "parts")
_MEDIA_PARTS = ("image", "image_url", "input_image", "audio", "input_audio", "audio_url", "video", "video_url", "file")
_MEDIA_PARTS += ("document", "input_file")
# Gemini's parts name themselves by their key
_GEMINI_MEDIA = ("inlineData", "fileData", "inline_data", "file_data")
# what a turn may say beside these is named in the report
_KNOWN = {*ROLE_KEYS, *_TEXT_KEYS, *marks.TURN_MARKS, "mask", "masked", "train_detail", "reasoning_content"}
_KNOWN |= {"reasoning", "thinking", "tool_calls", "function_call", "tool_call_id", "name", "id"}


def read_turns(value: object, notes: list[str]) -> list[Turn]:
    """The turns of a conversation in their order; `notes` gets what was not read. Raises RowError, LeftOutError."""
    turns: list[Turn] = []
    if isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value):
        notes.append("a list of texts was read as what a user and the assistant say in turn")
        value = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(value)]
    for turn in _as_objects(value):
        role = next((turn[key] for key in ROLE_KEYS if not is_missing(turn.get(key))), None)
        kind = _ROLES.get(str(role).strip().lower())
        if kind is None:
            listed = ", ".join(name for name in _ROLES if _ROLES[name] != "call")
            raise RowError("a turn of unknown role", role, f"one of {listed}")
        notes += [f"key of a turn not used: {key}" for key in turn if key not in _KNOWN and not is_missing(turn[key])]
        if any(not is_missing(turn.get(key)) for key in marks.MEDIA):
            raise LeftOutError(marks.PICTURES)
        turns += _read_turn(kind, str(role), turn, notes)
    return _joined(turns, notes)


def _joined(turns: list[Turn], notes: list[str]) -> list[Turn]:
    """The turns with neighbouring texts of the assistant as one, as chats have them; calls and marks stay apart."""
    joined: list[Turn] = []
    for turn in turns:
        last = joined[-1] if joined else {}
        if turn["role"] == last.get("role") == "assistant" and {*turn, *last} == {"role", "content"}:
            notes.append("neighbouring turns of the assistant: joined")
            joined[-1] = {**last, "content": f"{last['content']}\n\n{turn['content']}"}
        else:
            joined.append(turn)
    return joined


def pairs_of(value: object) -> object:
    """Alpaca's history [["question", "answer"], ...] and [{"human", "assistant"}, ...] as turns; others as they are."""
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        both = [zip(("user", "assistant"), pair, strict=True) for pair in value]
        return [{"role": role, "content": text} for pair in both for role, text in pair]
    if all(isinstance(item, dict) and not any(key in item for key in ROLE_KEYS) for item in value):
        keys = [str(key) for item in value for key in item]
        if all(_ROLES.get(key.lower()) in ("user", "assistant", "system") for key in keys):
            return [{"role": key, "content": text} for item in value for key, text in item.items()]
    return value


def _read_turn(kind: str, role: str, turn: Turn, notes: list[str]) -> list[Turn]:
    if kind != "assistant" and any(turn.get(name) not in (None, False) for name in ("train", "trainable", "training")):
        notes.append(f"a {role} turn marked to be trained: only assistant turns are")
    content = next((turn[key] for key in _TEXT_KEYS if not is_missing(turn.get(key))), "")
    message: Turn = {"role": kind}
    extra: list[Turn] = []
    if kind == "call":  # LLaMA-Factory: the call itself is the text
        message = {"role": "assistant", "tool_calls": _calls(content)}
        content = ""
    elif isinstance(content, list):
        content, parts, extra = _parts(content, role)
        message |= parts
    elif kind == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise RowError(f"the content of a {role} turn is not text", content, "write a string")
    content = marks.check_media(clean(content))
    thoughts = next(
        (turn[k] for k in ("reasoning_content", "reasoning", "thinking") if not is_missing(turn.get(k))), None
    )
    if thoughts is not None and not isinstance(thoughts, str):
        raise RowError(f"the reasoning of a {role} turn is not text", thoughts, "write a string")
    if message["role"] == "assistant":
        calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
        thought, content = split_thinking(content)
        if reasoning := only_thoughts(clean(thoughts or "")) or message.get("reasoning_content") or thought:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = _calls(calls)
        if not content and not message.get("tool_calls"):
            notes.append("an assistant turn without text: context only")
            message["untrained"] = True
        if marks.is_untrained(turn):
            message["untrained"] = True
    if kind == "tool":
        message |= {key: str(turn[key]) for key in ("tool_call_id", "name") if not is_missing(turn.get(key))}
    message["content"] = content
    # what a user's turn brings back of tools stands before what the user says
    return [*extra, message] if content or message.get("tool_calls") or not extra else extra


def _parts(content: list[Any], role: str) -> tuple[str, Turn, list[Turn]]:
    """(text, fields of the turn, turns of tools) of content in parts: OpenAI's and Anthropic's forms."""
    texts: list[str] = []
    fields: Turn = {}
    results: list[Turn] = []
    for part in content:
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in _MEDIA_PARTS or (isinstance(part, dict) and any(key in part for key in _GEMINI_MEDIA)):
            raise LeftOutError(marks.PICTURES)
        elif kind == "thinking" and isinstance(part.get("thinking"), str):
            fields["reasoning_content"] = clean(part["thinking"])
        elif isinstance(part, dict) and part.get("thought") is True and isinstance(part.get("text"), str):
            fields["reasoning_content"] = clean(part["text"])
        elif isinstance(part, dict) and isinstance(call := part.get("functionCall"), dict):
            fields.setdefault("tool_calls", []).extend(_calls([call]))
        elif isinstance(part, dict) and isinstance(result := part.get("functionResponse"), dict):
            response = json.dumps(result.get("response"), ensure_ascii=False)
            results.append({"role": "tool", "content": clean(response), "name": str(result.get("name"))})
        elif kind == "tool_use":
            fields.setdefault("tool_calls", []).extend(_calls([part | {"arguments": part.get("input")}]))
        elif kind == "tool_result":
            result = part.get("content")
            result = _parts(result, role)[0] if isinstance(result, list) else result
            results.append(
                {"role": "tool", "content": clean(str(result)), "tool_call_id": str(part.get("tool_use_id"))}
            )
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise RowError(f"the content of a {role} turn is not text", content, "write a string")
    return "".join(texts), fields, results


def _calls(value: Any) -> list[dict[str, Any]]:
    """Calls of tools in one form, arguments as an object: {"type": "function", "function": {"name", "arguments"}}."""
    try:
        listed = json.loads(value) if isinstance(value, str) else value
        calls = []
        for call in listed if isinstance(listed, list) else [listed]:
            function = call["function"] if isinstance(call.get("function"), dict) else call
            arguments = next((function[key] for key in ("arguments", "parameters", "args") if key in function), None)
            arguments = json.loads(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
            if not isinstance(function["name"], str) or not isinstance(arguments, dict):
                raise ValueError("a call has a name and an object of arguments")
            named = {"id": str(call["id"])} if not is_missing(call.get("id")) else {}
            # parquet writes every argument of every call, those that are not given as null
            given = {str(key): item for key, item in arguments.items() if item is not None}
            calls.append({**named, "type": "function", "function": {"name": function["name"], "arguments": given}})
        return calls
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fix = 'write {"function": {"name": "...", "arguments": {...}}}'
        raise RowError("a call of a tool that cannot be read", value, fix) from error


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Declared tools as templates take them: [{"type": "function", "function": {"name", ...}}]; [] for none."""
    if is_missing(value):
        return []
    try:
        listed = json.loads(value) if isinstance(value, str) else value
        listed = listed if isinstance(listed, list) else [listed]
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in listed]
        # Gemini's tools are lists of functions, Anthropic's call their parameters otherwise
        tools = [one for tool in tools for one in tool.get("functionDeclarations") or [tool]]
        tools = [{"parameters" if key == "input_schema" else key: tool[key] for key in tool} for tool in tools]
        wrapped = [tool if isinstance(tool.get("function"), dict) else {"function": tool} for tool in tools]
        if not all(isinstance(tool["function"]["name"], str) for tool in wrapped):
            raise ValueError("a tool has a name")
        return [{"type": "function", **_without_nulls(tool)} for tool in wrapped]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fix = 'write [{"type": "function", "function": {"name": "...", "parameters": {...}}}]'
        raise RowError("tools that cannot be read", value, fix) from error


def calls_in(answer: object) -> list[dict[str, Any]]:
    """The calls that an answer consists of, as data sets of calls keep them; [] where it is anything else."""
    if not isinstance(answer, (str, list)) or (isinstance(answer, str) and not answer.lstrip().startswith(("[", "{"))):
        return []
    try:
        return _calls(answer)
    except RowError:
        return []


def _as_objects(value: object) -> list[Mapping[str, Any]]:
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"messages that begin like JSON but are not: {error}", value, "write a JSON list") from error
    if isinstance(value, dict) and value and all(isinstance(items, list) for items in value.values()):
        lengths = {len(items) for items in value.values()}  # `datasets` writes a list of objects as an object of lists
        if len(lengths) == 1:
            value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    value = pairs_of(value)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        fix = 'write [{"role": "user", "content": "..."}, ...]'
        raise RowError("the messages are not a list of objects", value, fix)
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
