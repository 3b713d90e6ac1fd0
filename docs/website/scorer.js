/* The guide answers questions, the reference describes names: where both have a word, the guide comes first. */
var Scorer = {
  score: (result) => result[4] + (result[0].startsWith("guide/") ? 4 : 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
