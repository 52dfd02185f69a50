"""What the browser does by itself, without asking the server."""

MARK_BELOW = """threshold => {
  const cards = document.querySelector('#labelled .cards');
  if (!cards) return;
  cards.style.setProperty('--threshold', `${100 * threshold}%`);
  cards.querySelectorAll('[data-score]').forEach(bar =>
    bar.classList.toggle('below', Number(bar.dataset.score) < threshold));
}"""
"""Labels below the threshold turn pale."""

HIDE_BELOW = """cutoff => {
  let hidden = 0;
  document.querySelectorAll('#results [data-share]').forEach(hit => {
    hit.hidden = Number(hit.dataset.share) < cutoff / 100;
    hidden += hit.hidden ? 1 : 0;
  });
  const said = document.querySelector('#results .left-out');
  if (said) said.textContent = hidden ? `, ${hidden} hidden` : '';
}"""
"""Images below the cutoff are hidden."""

ON_HIT = """element.addEventListener('click', event => {
  const hit = event.target.closest('button[data-place]');
  if (!hit) return;
  element.querySelectorAll('button[data-place]').forEach(other =>
    other.setAttribute('aria-pressed', String(other === hit)));
  trigger('select', {place: Number(hit.dataset.place)});
});"""

SHOW_SELECTED = """() => setTimeout(() => {
  const button = document.querySelector('#more-like');
  if (!button) return;
  document.querySelector('#selected').scrollIntoView({block: 'nearest'});
  button.focus({preventScroll: true});
}, 50)"""
"""The selected image comes into view, and Enter looks for more like it."""

SHOW_ANSWER = """() => setTimeout(() => {
  const answers = [...document.querySelectorAll('#labelled, #results, #maps')].filter(each => each.offsetParent);
  if (answers.length && answers[0].getBoundingClientRect().top > 0.6 * innerHeight)
    answers[0].scrollIntoView({block: 'start'});
}, 50)"""
"""On a phone, where an answer stands below what was asked, it comes into view."""

__all__ = ["HIDE_BELOW", "MARK_BELOW", "ON_HIT", "SHOW_ANSWER", "SHOW_SELECTED"]
