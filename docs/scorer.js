// Sphinx's scores of search results, with answers for users first and the changelog last (`var`, as Sphinx loads it twice)
var Scorer = {
  first: {howto: 20, commands: 10, changelog: -20},
  score: ([docname, title, anchor, descr, score]) => score + (Scorer.first[docname] || 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: {0: 15, 1: 5, 2: -5},
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
