"use strict";
const cards = [...document.querySelectorAll(".card")];
const texts = cards.map((card) => card.querySelector(".words").textContent.toLowerCase());
const filter = document.getElementById("filter");
const radios = [...document.querySelectorAll("input[name=group]")];
const atOnce = Number(document.currentScript.dataset.cards);
let most = atOnce;

function show() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const group = radios.find((radio) => radio.checked).value;
  let fitting = 0;
  cards.forEach((card, index) => {
    const fits = (!group || card.dataset.groups.split(" ").includes(group))
      && words.every((word) => texts[index].includes(word));
    fitting += fits;
    card.hidden = !fits || fitting > most;
  });
  document.getElementById("shown").value = fitting === cards.length
    ? `${Math.min(most, fitting)} of ${fitting} shown`
    : `${fitting} of ${cards.length} match`;
  document.getElementById("none").hidden = fitting > 0;
  document.getElementById("more").hidden = fitting <= most;
}

function again() {
  most = atOnce;
  show();
}

function more(count) {
  const next = cards.filter((card) => !card.hidden).length;
  most += count;
  show();
  // The button may be gone; the keyboard goes on at the first picture that came.
  cards.filter((card) => !card.hidden)[next]?.querySelector("button")?.focus({ preventScroll: true });
}

filter.addEventListener("input", again);
radios.forEach((radio) => radio.addEventListener("change", again));
document.getElementById("more-cards").addEventListener("click", () => more(atOnce));
document.getElementById("all-cards").addEventListener("click", () => more(cards.length));
document.querySelector(".filter").addEventListener("submit", (event) => event.preventDefault());
document.querySelectorAll(".picture").forEach((button) => button.addEventListener("click", () => {
  const large = button.closest(".card").classList.toggle("large");
  button.setAttribute("aria-pressed", large);
}));
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== filter) {
    event.preventDefault();
    filter.focus();
  } else if (event.key === "Escape" && filter.value) {
    filter.value = "";
    again();
  }
});
show();
