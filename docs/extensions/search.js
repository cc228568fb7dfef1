// Rank the results of Sphinx's search by how well titles and headings fit the whole query.
//
// Sphinx scores a page by its best word alone, in any heading, and sorts ties by the alphabet. Here a
// page comes first if its title has all words of the query, then if one of its headings has, which the
// result links to. A page is listed once. Entries of the index (`{index}` on a page) count as titles,
// or as headings if they have more words than the query: they have the words that people search for
// and a title doesn't have, and find a page without these words. Of a sentence, two thirds of the words
// in a page's title and entries are enough. A word that no page has is taken for the nearest one in a
// title, a heading or an entry: a misspelling. Sphinx includes this file after its own code; what else
// is found is left to that.

if (typeof Search !== "undefined") {
  const TITLE = 60, HEADING = 40, WORDS = 20; // what has all words of the query
  const MOST = 2 / 3; // of the words of a query
  const FITS = 20; // times the share of the title or heading that the query makes up
  const LITERAL = 0.2; // added to that share: the same forms of the words, "checkpoint", not "checkpointing"
  const IN_TITLE = 10; // times the share of the query that is in the page's title
  const NAME = 55, PART_OF_NAME = 1; // of a class, function or attribute, such as `Trainer.train`
  // Pages for users before those for authors of plugins, before lists of everything.
  const FOLDERS = [
    ["start/", 9], ["how_to/", 9], ["plugins/hooks/", 0], ["plugins/", 6], ["understand/", 5],
    ["reference/api", 0], ["reference/errors", 0], ["reference/changelog", -9],
    ["reference/glossary", -40], ["reference/", 4],
  ];

  const words = (text) =>
    splitQuery(text.toLowerCase()).filter((word) => !stopwords.has(word) && !/^\d+$/.test(word));
  const stems = (text) => new Set(words(text).map((word) => new Stemmer().stemWord(word)));

  // The share of a title that the query makes up; 0 if a word of the query isn't in it.
  const fit = (query, title) => {
    const parts = stems(title), wanted = stems(query);
    if (!wanted.size || ![...wanted].every((word) => parts.has(word))) return 0;
    const literal = new Set(words(title));
    const isLiteral = words(query).every((word) => literal.has(word));
    return wanted.size / parts.size + (isLiteral ? LITERAL : 0);
  };

  const shareIn = (title, query) => {
    const parts = stems(title), wanted = [...stems(query)];
    return wanted.filter((word) => parts.has(word)).length / (wanted.length || 1);
  };

  // How many letters to insert, remove, replace or swap with the next one, to make one word of another.
  const distance = (one, other) => {
    let before = [], last = Array.from({ length: other.length + 1 }, (_, column) => column);
    for (let row = 1; row <= one.length; row++) {
      const now = [row];
      for (let column = 1; column <= other.length; column++) {
        const replaced = last[column - 1] + (one[row - 1] === other[column - 1] ? 0 : 1);
        now[column] = Math.min(replaced, last[column] + 1, now[column - 1] + 1);
        if (row > 1 && one[row - 1] === other[column - 2] && one[row - 2] === other[column - 1])
          now[column] = Math.min(now[column], before[column - 2] + 1);
      }
      [before, last] = [last, now];
    }
    return last[other.length];
  };

  const isKnown = (word) => {
    const { terms, titleterms, objects } = Search._index;
    const stem = new Stemmer().stemWord(word);
    const names = [...Object.keys(objects), ...Object.values(objects).flat().map((found) => found[4])];
    return [terms, titleterms].some((found) => Object.keys(found).some((term) => term.includes(stem)))
      || names.some((name) => name.toLowerCase().includes(word));
  };

  const corrected = (query) => {
    const { alltitles, indexentries } = Search._index;
    const vocabulary = new Set([...Object.keys(alltitles), ...Object.keys(indexentries)].flatMap(words));
    for (const word of words(query)) {
      if (word.length < 4 || isKnown(word)) continue;
      const most = word.length < 8 ? 1 : 2;
      const [nearest] = [...vocabulary]
        .map((other) => [other, distance(word, other)])
        .filter(([, letters]) => letters <= most)
        .sort(([, one], [, other]) => one - other);
      if (nearest) query = query.toLowerCase().replace(word, nearest[0]);
    }
    return query;
  };

  const folder = (docname) => (FOLDERS.find(([start]) => docname.startsWith(start)) ?? ["", 0])[1];

  const headings = (query) => {
    const found = new Map(); // for each page, its heading that fits best
    for (const [title, places] of Object.entries(Search._index.alltitles)) {
      const share = fit(query, title);
      if (!share) continue;
      for (const [file, id] of places)
        if (id && share > (found.get(file)?.share ?? 0)) found.set(file, { title, id, share });
    }
    return found;
  };

  const entries = (query) => {
    const found = new Map(); // for each page, its entry in the index that fits best
    for (const [entry, places] of Object.entries(Search._index.indexentries)) {
      const share = fit(query, entry);
      for (const [file, id] of places) {
        if (id.includes(".")) continue; // a name of the API
        if (share > (found.get(file)?.share ?? 0)) found.set(file, { id, share });
      }
    }
    return found;
  };

  // The pages whose title and entries have most words of the query, with the share of these.
  const topics = (query) => {
    const { titles, indexentries } = Search._index;
    const texts = [...titles];
    for (const [entry, places] of Object.entries(indexentries))
      for (const [file, id] of places) if (!id.includes(".")) texts[file] += ` ${entry}`;
    return texts.map((text, file) => [file, shareIn(text, query)]).filter(([, share]) => share >= MOST);
  };

  const find = Search._performSearch;
  Search._performSearch = (asked, ...parsed) => {
    const fixed = corrected(asked);
    const [query, ...terms] = fixed === asked ? [asked, ...parsed] : Search._parseQuery(fixed);
    const { docnames, titles } = Search._index;
    const byHeading = headings(query);
    const exact = query.toLowerCase().trim();
    const best = new Map();
    const add = (key, result) => {
      result[4] += folder(result[0]);
      if (result[4] > (best.get(key)?.[4] ?? -Infinity)) best.set(key, result);
    };
    for (const [docname, name, anchor, description, score, filename, kind] of find(query, ...terms)) {
      const file = docnames.indexOf(docname);
      const page = titles[file];
      let result = [docname, name, anchor, description, 0, filename, kind];
      let key = docname;
      if (kind === "object") {
        key += anchor;
        result[4] = `.${name.toLowerCase()}`.endsWith(`.${exact}`) ? NAME : PART_OF_NAME;
      } else if (kind === "index") {
        continue; // added below
      } else {
        const inTitle = fit(query, page), heading = byHeading.get(file);
        result = [docname, page, "", null, 0, filename, "text"];
        if (inTitle) result[4] = TITLE + FITS * inTitle;
        else if (heading) {
          result[1] = `${page} > ${heading.title}`;
          result[2] = `#${heading.id}`;
          result[4] = HEADING + FITS * heading.share;
        } else result[4] = WORDS + IN_TITLE * shareIn(page, query);
      }
      add(key, result);
    }
    for (const [file, { id, share }] of entries(query)) {
      const page = docnames[file], heading = byHeading.get(file);
      const score = share >= 1 ? TITLE + FITS : HEADING + FITS * share;
      let anchor = id === "index-0" ? "" : `#${id}`; // the first one is at the top of its page
      let name = titles[file];
      if (!anchor && heading && !fit(query, name)) {
        anchor = `#${heading.id}`;
        name += ` > ${heading.title}`;
      }
      add(page, [page, name, anchor, null, score, `${page}.md`, "index"]);
    }
    for (const [file, share] of topics(query)) {
      const page = docnames[file];
      add(page, [page, titles[file], "", null, WORDS + FITS * share, `${page}.md`, "text"]);
    }
    return [...best.values()].sort(_orderResultsByScoreThenName);
  };

  // Sphinx fetches each page that it lists to quote from it, which a page opened as a file can't do.
  // Each result gets the first sentence of its page instead (`summaries.py`).
  const addSummaries = (list) => {
    for (const item of list.querySelectorAll("li.kind-text, li.kind-index")) {
      const page = item.querySelector("a").getAttribute("href").replace(/\.html.*/, "");
      if (item.querySelector("p") || !SUMMARIES[page]) continue;
      const text = item.appendChild(document.createElement("p"));
      text.className = "context";
      text.textContent = SUMMARIES[page];
    }
  };
  const perform = Search.performSearch;
  Search.performSearch = (query) => {
    perform(query);
    addSummaries(Search.output);
    new MutationObserver(() => addSummaries(Search.output)).observe(Search.output, { childList: true });
  };
}
