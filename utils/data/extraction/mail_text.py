"""Mails, one or a mailbox of them, by the standard library: the head that people read, and the body."""

from __future__ import annotations

import mailbox
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from utils.data.extraction.extracted import Extracted, NoTextError
from utils.data.extraction.pages.html_text import extract_html

# messages inside messages
DEEPEST = 20


def extract_mail(path: Path) -> Extracted:
    """Subject, sender, receivers, date and body of a message, and of those that it forwards; attachments are counted.

    A body may be in several parts, as Apple's Mail writes it around a picture.
    """
    text, attached = _message(message_from_bytes(path.read_bytes(), policy=policy.default))
    if not text:
        raise NoTextError("the message has no text")
    return Extracted.whole(text, notes=_left_out(attached, 0))


def extract_mailbox(path: Path) -> Extracted:
    """Every message of a mailbox (.mbox) as a document of its own."""
    documents, attached, empty = [], 0, 0
    messages = mailbox.mbox(path, factory=_parsed, create=False)
    try:
        for number, message in enumerate(messages, 1):
            text, files = _message(message)
            attached, empty = attached + files, empty + (not text)
            documents += [(str(number), text)] if text else []
    finally:
        messages.close()
    if not documents:
        raise NoTextError("the mailbox has no message with text")
    return Extracted(documents, notes=_left_out(attached, empty))


def _parsed(file: Any) -> Any:
    return message_from_bytes(file.read(), policy=policy.default)


def _message(message: Any, depth: int = 0) -> tuple[str, int]:
    """(head and body, "" without text; number of attachments)."""
    head = [f"{name}: {message[name]}" for name in ("From", "To", "Cc", "Date", "Subject") if message[name]]
    body = message.get_body(preferencelist=("plain", "html"))
    texts, attached = [_body(body)] if body is not None else [], 0
    for part in message.iter_attachments() if message.is_multipart() else ():
        inside_it = part.get_payload() if part.get_content_type() == "message/rfc822" else None
        if isinstance(inside_it, list) and inside_it and depth < DEEPEST:
            text, inside = _message(inside_it[0], depth + 1)
            texts, attached = [*texts, text], attached + inside
        elif part.get_content_type() in ("text/plain", "text/html") and not (
            part.is_attachment() or part.get_filename()
        ):
            texts.append(_body(part))
        else:
            attached += 1
    text = "\n\n".join(one.strip("\r\n") for one in texts if one.strip())
    return ("\n".join(head) + f"\n\n{text}" if text or message["Subject"] else ""), attached


def _left_out(attached: int, empty: int) -> list[str]:
    notes = [f"{attached} attachments were left out"] if attached else []
    return notes + ([f"{empty} messages have no text"] if empty else [])


def _body(part: EmailMessage) -> str:
    try:
        content = part.get_content()
    except (LookupError, UnicodeError):  # a charset that nobody knows
        content = (part.get_payload(decode=True) or b"").decode("utf-8", "replace")
    if not isinstance(content, str):
        return ""
    return extract_html(content).documents[0][1] if part.get_content_type() == "text/html" else content
